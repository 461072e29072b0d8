"""Products of few rows with an NF4 weight, decoded in registers on their way to the tensor cores (Pallas Mosaic GPU).

Why it exists: up to some hundred rows a product waits for its weights, and a decoded weight that is written and read
again is eight times as much to move. Here bytes come to shared memory by TMA, are looked up by byte permutes where
they stand as an operand of `wgmma`, and never leave the registers. A thread holds eight neighbours of a row where
wgmma wants them spread over 32 columns; a sum does not mind, so x's columns are permuted instead of the weight's.
Numerics: the table and the scales are rounded to bfloat16 before they are multiplied, which the reference does after;
sums are float32. Refuses what is not bfloat16 in blocks of 64, sizes that tiles do not divide, GPUs other than Hopper,
and JAX before 0.11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels._device import compute_capability
from pallas_kernels._triton import interpreting
from pallas_kernels.nf4.reference import decode_scales
from pallas_kernels.nf4.tensor import NF4Tensor
from pallas_kernels.nf4_matmul.lookup import bits_in, byte_permutes

MOST_ROWS = 512
# Columns of one step of wgmma's operand in registers, and of one scale.
_STEP = 64


class Tiles(NamedTuple):
    """rows: of x. outputs: rows of the weight for one of `groups` warpgroups. columns: of a step; steps: in flight.
    split: parts that the columns are cut into, summed at the end."""

    rows: int
    outputs: int = 64
    groups: int = 2
    columns: int = 128
    steps: int = 4
    split: int = 1


def unsupported_reason(x: Array, w: Any) -> str | None:
    """Why x and w cannot be multiplied here, or None."""
    if not hasattr(plgpu, "inline_mgpu") or jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or newer, this is {jax.__version__}"
    if not isinstance(w, NF4Tensor) or w.block_size != _STEP:
        return f"it multiplies by one weight in blocks of {_STEP}"
    if x.dtype != jnp.bfloat16 or w.dtype != "bfloat16":
        return f"it computes in bfloat16, and x is {x.dtype}, the weight {w.dtype}"
    rows = x.size // x.shape[-1]
    if not 1 <= rows <= MOST_ROWS:
        return f"it serves 1 to {MOST_ROWS} rows, not {rows}"
    tiles = tiles_for(rows, w)
    if w.shape[0] % (tiles.outputs * tiles.groups) or w.shape[1] % (tiles.columns * tiles.split):
        return f"its tiles do not divide a weight {w.shape}"
    if interpreting():
        return "the interpreter takes no operands in registers"
    capability = compute_capability()
    if capability is None or not 9.0 <= capability < 10.0:
        return "it needs a Hopper GPU (compute capability 9.0)"
    return None


def tiles_for(rows: int, w: NF4Tensor) -> Tiles:
    """The tiling for so many rows of x."""
    n, k = w.shape
    size = min(256, max(16, pl.next_power_of_2(rows)))
    outputs = 64
    columns = 64 if rows > 64 or k % 128 else 128
    programs = -(-rows // size) * (n // (2 * outputs))
    split = max((s for s in (1, 2, 4, 7, 8) if k % (columns * s) == 0 and programs * s <= 2 * _CORES), default=1)
    return Tiles(size, outputs, columns=columns, split=split if rows <= 64 else 1)


def nf4_matmul_mosaic(x: Array, w: NF4Tensor) -> Array:
    """y = x W^T: [..., in] -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    return tiled_product(rows, w, tiles_for(rows.shape[0], w)).reshape(*x.shape[:-1], -1)


def tiled_product(x: Array, w: NF4Tensor, tiles: Tiles) -> Array:
    """[M, K] -> [M, N]."""
    (m, k), n = x.shape, w.shape[0]
    padded = jnp.pad(_permuted(x), ((0, -m % tiles.rows), (0, 0)))
    scales = decode_scales(w).reshape(n, k // _STEP).T.astype(jnp.bfloat16)
    parts = _kernel(padded.shape[0], n, k, tiles)(padded, w.codes.reshape(n, k // 2), scales)
    if tiles.split == 1:
        return parts[:m]
    return jnp.sum(parts.reshape(tiles.split, n, -1), axis=0).T[:m].astype(x.dtype)


def _permuted(x: Array) -> Array:
    """x's columns in the order in which the weight's come to stand before wgmma, within each 32.

    A lane holds the eight columns of four bytes, and the lanes of a row hold bytes 0, 8, 4 and 12 first; wgmma takes
    the lane's t-th pair as columns 8 t + 2 lane and the next.
    """
    m, k = x.shape
    return x.reshape(m, k // 32, 2, 2, 4, 2).transpose(0, 1, 4, 3, 2, 5).reshape(m, k)


def _kernel(m: int, n: int, k: int, tiles: Tiles) -> Callable[..., Array]:
    """(x [M, K], codes [N, K / 2], scales [K / 64, N]) -> [M, N], or [split * N, M] float32 parts."""
    rows, outputs, groups, columns, steps, split = tiles
    wide, part = outputs * groups, k // split
    row_tiles, output_tiles = m // rows, n // wide
    in_parts = split > 1

    def swizzled(width: int, bits: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(width * bits)
        return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)

    def kernel(x_gmem: Any, codes_gmem: Any, scales_gmem: Any, out_gmem: Any, out_smem: Any) -> None:
        def pipeline(body: Any, context: Any) -> Any:
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(part // columns,),
                memory_registers=40,
                in_specs=[
                    _block((wide, columns // 2), lambda i: (0, i), swizzled(_STEP // 2, 8)),
                    _block((rows, columns), lambda i: (0, i), swizzled(_STEP, 16)),
                    _block((columns // _STEP, wide), lambda i: (i, 0), ()),
                ],
                wg_axis="group",
                num_compute_wgs=groups,
                max_concurrent_steps=min(steps, part // columns),
                compute_context=context,
            )

        nothing = pipeline(lambda *_: None, lambda *_: None)
        allocations = nothing.get_allocations(codes_gmem, x_gmem, scales_gmem)

        @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="group")
        def _(allocations: Any) -> None:
            group = lax.axis_index("group")

            @plgpu.nd_loop((split * output_tiles * row_tiles,), collective_axes="program")
            def _(info: Any) -> None:
                (index,) = info.index
                row = pl.ds((index % row_tiles) * rows, rows)
                output = (index // row_tiles) % output_tiles
                number = index // (row_tiles * output_tiles)
                mine = pl.ds(group * outputs, outputs)

                def context(run: Any) -> None:
                    @functools.partial(pl.run_scoped, sums=plgpu.ACC((outputs, rows), jnp.float32))
                    def _(sums: Any) -> None:
                        run(sums)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        if in_parts:
                            out_smem[group] = sums[...]
                            target = out_gmem.at[pl.ds(number * n + output * wide, wide), row].at[mine]
                        else:
                            values = sums[...].astype(jnp.bfloat16)
                            out_smem.at[group].T[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
                            target = out_gmem.at[row, pl.ds(output * wide, wide)].at[:, mine]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(out_smem.at[group], target)

                load: Any = plgpu.load  # whose signature differs between versions

                def body(_: Any, codes_smem: Any, x_smem: Any, scales_smem: Any, sums: Any) -> Any:
                    for step in range(columns // _STEP):
                        bytes_at = codes_smem.at[mine, step * _STEP // 2 : (step + 1) * _STEP // 2]
                        values = decoded(load(bytes_at, layout=plgpu.Layout.WGMMA_UPCAST_2X))
                        scale = load(scales_smem.at[step, mine], layout=plgpu.Layout.WGMMA.reduce(1))
                        weights = values * lax.broadcast_in_dim(scale, values.shape, [0])
                        plgpu.wgmma(sums, weights, x_smem.at[:, step * _STEP : (step + 1) * _STEP].T)
                    plgpu.wgmma_wait(0)
                    return sums

                columns_at, outputs_at = pl.ds(number * part, part), pl.ds(output * wide, wide)
                pipeline(body, context)(
                    codes_gmem.at[outputs_at, pl.ds(number * (part // 2), part // 2)],
                    x_gmem.at[row, columns_at],
                    scales_gmem.at[pl.ds(number * (part // _STEP), part // _STEP), outputs_at],
                    allocations=allocations,
                )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape = (split * n, m) if in_parts else (m, n)
    tile, bits = ((outputs, rows), 32) if in_parts else ((rows, outputs), 16)
    dtype = jnp.float32 if in_parts else jnp.bfloat16
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(min(_CORES, split * output_tiles * row_tiles),),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name="nf4_matmul_mosaic",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types={"out_smem": plgpu.SMEM((groups, *tile), dtype, transforms=swizzled(tile[1], bits))},
    )


def _block(shape: tuple[int, int], index: Callable[[Any], Any], transforms: tuple[Any, ...]) -> Any:
    return plgpu.BlockSpec(shape, index, transforms=transforms, memory_space=plgpu.SMEM)


def decoded(codes: Array) -> Array:
    """uint8 [R, C] -> bfloat16 table values [R, 2 C], high nibbles first but for the order of `_permuted`."""
    shape = (codes.shape[0], 2 * codes.shape[1])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def looked_up(_: Any, array: Any) -> Any:
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        four = llvm.StructType.get_literal([i32] * 4)
        for index, register in np.ndenumerate(array.registers):
            out: Any = llvm.inline_asm(four, [mgpu.utils.bitcast(register, i32)], _LOOKUP, "=r,=r,=r,=r,r")
            for t in range(4):
                at = (index[0], index[1] * 4 + t, *index[2 : registers.ndim])
                registers[at] = mgpu.utils.bitcast(llvm.extractvalue(i32, out, (t,)), pair)
        assert all(register is not None for register in registers.flat)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return looked_up(codes)


# Multiprocessors of the GPUs that this serves.
_CORES = 132
_LOOKUP = byte_permutes(bits_in(jnp.bfloat16))
