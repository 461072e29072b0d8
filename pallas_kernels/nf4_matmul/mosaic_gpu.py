"""Products of up to some hundred rows with an NF4 weight, decoded in registers on their way to the tensor cores (Pallas
Mosaic GPU).

Why it exists: such a product waits for its weights, and a decoded weight that is written and read again is eight times
as much to move. Here bytes come to shared memory by TMA, a byte of codes becomes a pair of values in the registers that
`wgmma` takes an operand from (see tile_assembly.py), and values never leave them. Up to 16 rows have a kernel of their
own (mosaic_few.py). Numerics: the table and the scales are rounded to bfloat16 before they are multiplied, which the
reference does after; sums are float32. Refuses what is not bfloat16 in blocks of 64, sizes that tiles do not divide,
GPUs other than Hopper, and JAX before 0.11.
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

from pallas_kernels._device import multiprocessors
from pallas_kernels._mosaic import hopper_reason
from pallas_kernels.nf4.reference import DYNAMIC_MAP
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.nf4_matmul import mosaic_few
from pallas_kernels.nf4_matmul.mosaic_few import pairs
from pallas_kernels.nf4_matmul.tile_assembly import scales_pitch, scales_text, weights_text

MOST_ROWS = 512
# Up to so many, columns are cut into parts where tiles are too few for the GPU.
_SPLIT_ROWS = 64
# Columns of one step of wgmma's operand in registers, and of one scale.
_STEP = 64
# Rows of a weight for one warpgroup.
_OUTPUTS = 64
# Bytes of shared memory that a kernel may have; some are Mosaic's.
_SHARED = 232448 - 2048


class Tiles(NamedTuple):
    """rows: of x. groups: warpgroups of 64 rows of the weight. columns: of a step; steps: in flight. split: parts that
    the columns are cut into, summed at the end."""

    rows: int
    groups: int = 2
    columns: int = 128
    steps: int = 8
    split: int = 1

    def fitted(self, k: int) -> Tiles:
        """With as many of the steps as there is shared memory for."""
        out = self.groups * self.rows * _OUTPUTS * (4 if self.split > 1 else 2)
        scales = self.groups * 32 * 4 * scales_pitch(k // self.split // _STEP)
        step = self.rows * self.columns * 2 + self.groups * _OUTPUTS * self.columns // 2
        return self._replace(steps=min(self.steps, (_SHARED - out - scales - 256 * 32 * 4) // step))


def unsupported_reason(x: Array, w: Any) -> str | None:
    """Why x and w cannot be multiplied here, or None."""
    if (reason := hopper_reason()) is not None:
        return reason
    stack = w.stack if isinstance(w, NF4Layer) else w
    if not isinstance(stack, NF4Tensor) or stack.block_size != _STEP or stack.nested_dtype != "float32":
        return f"it multiplies by one weight in blocks of {_STEP} with scales of float32"
    if x.dtype != jnp.bfloat16 or stack.dtype != "bfloat16":
        return f"it computes in bfloat16, and x is {x.dtype}, the weight {stack.dtype}"
    rows: Any = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    if mosaic_few.unsupported_reason(rows, [w]) is None:
        return None
    if not 1 <= rows.shape[0] <= MOST_ROWS:
        return f"it serves 1 to {MOST_ROWS} rows, not {rows.shape[0]}"
    tiles = tiles_for(rows.shape[0], w)
    if w.shape[0] % (_OUTPUTS * tiles.groups) or w.shape[1] % (tiles.columns * tiles.split):
        return f"its tiles do not divide a weight {w.shape}"
    if tiles.steps < 2:
        return f"a row of {w.shape[1]} columns leaves no shared memory for its tiles"
    return None


def is_fastest(rows: int, w: NF4Tensor | NF4Layer) -> bool:
    """Whether it was on an H200 for so many rows of x, where it can run (see docs/kernels.md)."""
    n, k = w.shape
    # Columns are cut into parts for few rows alone; weights of few rows and many columns then lack work for the GPU.
    return rows <= _SPLIT_ROWS or (rows <= MOST_ROWS and n >= 2 * k)


def tiles_for(rows: int, w: NF4Tensor | NF4Layer) -> Tiles:
    """The tiling for so many rows of x."""
    n, k = w.shape
    size = min(256, max(16, pl.next_power_of_2(rows)))
    columns = 64 if rows > 64 or k % 128 else 128
    programs = -(-rows // size) * (n // (2 * _OUTPUTS))
    split = max((s for s in (1, 2, 4, 7, 8) if k % (columns * s) == 0 and programs * s <= multiprocessors()), default=1)
    return Tiles(size, columns=columns, split=split if rows <= _SPLIT_ROWS else 1).fitted(k)


def nf4_matmul_mosaic(x: Array, w: NF4Tensor | NF4Layer, dtype: Any = None) -> Array:
    """y = x W^T: [..., in] -> [..., out], of x's dtype or another."""
    rows = x.reshape(-1, x.shape[-1])
    if mosaic_few.unsupported_reason(rows, [w]) is None:
        y = mosaic_few.few_rows(rows, [w], dtype=dtype)
    else:
        y = tiled_product(rows, w, tiles_for(rows.shape[0], w))
    return y.reshape(*x.shape[:-1], -1).astype(dtype or x.dtype)


def tiled_product(x: Array, w: NF4Tensor | NF4Layer, tiles: Tiles) -> Array:
    """[M, K] -> [M, N]."""
    m, n = x.shape[0], w.shape[0]
    layer = w if isinstance(w, NF4Layer) else NF4Layer(jax.tree.map(lambda leaf: leaf[None], w), np.int32(0))
    padded = jnp.pad(x, ((0, -m % tiles.rows), (0, 0)))
    parts = _kernel(padded.shape[0], layer.stack, tiles)(*_operands(padded, layer))
    if tiles.split == 1:
        return parts[:m]
    return jnp.sum(parts.reshape(tiles.split, n, -1), axis=0).T[:m].astype(x.dtype)


def _operands(x: Array, w: NF4Layer) -> list[Any]:
    stack, (n, k) = w.stack, w.shape
    copies = np.repeat(pairs()[:, None], 32, axis=1)
    operands = [jnp.reshape(jnp.asarray(w.index, jnp.int32), (1,)), x, jnp.asarray(copies)]
    operands += [stack.codes.reshape(-1, n, k // 2), stack.absmax.reshape(-1, n, k // _STEP)]
    return operands + ([jnp.asarray(DYNAMIC_MAP), stack.nested_absmax, stack.nested_offset] if stack.is_nested else [])


def _kernel(m: int, stack: NF4Tensor, tiles: Tiles) -> Callable[..., Array]:
    """(what `_operands` gives) -> [M, N], or [split * N, M] float32 parts."""
    n, k = stack.shape
    rows, groups, columns, steps, split = tiles
    wide, part, per_row = _OUTPUTS * groups, k // split, k // _STEP
    row_tiles, output_tiles, blocks = m // rows, n // wide, part // _STEP
    in_parts = split > 1

    def swizzled(width: int, bits: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(width * bits)
        return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)

    def kernel(index_gmem: Any, x_gmem: Any, table_gmem: Any, codes_gmem: Any, absmax_gmem: Any, *rest: Any) -> None:
        *nested, out_gmem, out_smem, table_smem, scales_smem, barrier = rest
        layer = index_gmem[0]
        codes_gmem, absmax_gmem = codes_gmem.at[layer], absmax_gmem.at[layer]
        nested = [nested[0], *(ref.at[layer] for ref in nested[1:])] if nested else []

        def pipeline(body: Any, context: Any) -> Any:
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(part // columns,),
                memory_registers=40,
                in_specs=[
                    _block((wide, columns // 2), lambda i: (0, i), ()),
                    _block((rows, columns), lambda i: (0, i), swizzled(_STEP, 16)),
                ],
                wg_axis="group",
                num_compute_wgs=groups,
                max_concurrent_steps=min(steps, part // columns),
                compute_context=context,
            )

        allocations = pipeline(lambda *_: None, lambda *_: None).get_allocations(codes_gmem, x_gmem)

        @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="group")
        def _(allocations: Any) -> None:
            group = lax.axis_index("group")

            @pl.when(group == 0)
            def _() -> None:
                plgpu.copy_gmem_to_smem(table_gmem, table_smem, barrier)

            plgpu.barrier_wait(barrier)

            @plgpu.nd_loop((split * output_tiles * row_tiles,), collective_axes="program")
            def _(info: Any) -> None:
                (index,) = info.index
                row = pl.ds((index % row_tiles) * rows, rows)
                output = (index // row_tiles) % output_tiles
                number = index // (row_tiles * output_tiles)
                mine = pl.ds(group * _OUTPUTS, _OUTPUTS)

                def context(run: Any) -> None:
                    here = pl.ds(output * wide + group * _OUTPUTS, _OUTPUTS), pl.ds(number * blocks, blocks)
                    _put_scales(scales_smem.at[group], absmax_gmem.at[here], absmax_gmem, nested, blocks, per_row)

                    @functools.partial(pl.run_scoped, sums=plgpu.ACC((_OUTPUTS, rows), jnp.float32))
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

                def body(indices: Any, codes_smem: Any, x_smem: Any, sums: Any) -> Any:
                    (i,) = indices
                    for step in range(columns // _STEP):
                        bytes_at = codes_smem.at[mine, step * _STEP // 2 : (step + 1) * _STEP // 2]
                        scales_at = scales_smem.at[group, :, pl.ds(i * (columns // _STEP) + step, 1)]
                        weights = _decoded(bytes_at, table_smem, scales_at, columns // 2, 4 * scales_pitch(blocks))
                        plgpu.wgmma(sums, weights, x_smem.at[:, step * _STEP : (step + 1) * _STEP].T)
                    plgpu.wgmma_wait(0)
                    return sums

                columns_at, outputs_at = pl.ds(number * part, part), pl.ds(output * wide, wide)
                pipeline(body, context)(
                    codes_gmem.at[outputs_at, pl.ds(number * (part // 2), part // 2)],
                    x_gmem.at[row, columns_at],
                    allocations=allocations,
                )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape = (split * n, m) if in_parts else (m, n)
    tile, bits = ((_OUTPUTS, rows), 32) if in_parts else ((rows, _OUTPUTS), 16)
    dtype = jnp.float32 if in_parts else jnp.bfloat16
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(min(multiprocessors(), split * output_tiles * row_tiles),),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name="nf4_matmul_mosaic",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            plgpu.SMEM((groups, *tile), dtype, transforms=swizzled(tile[1], bits)),
            plgpu.SMEM((256, 32), jnp.int32),
            plgpu.SMEM((groups, 32, scales_pitch(blocks)), jnp.int32),
            plgpu.Barrier(),
        ],
    )


def _block(shape: tuple[int, int], index: Callable[[Any], Any], transforms: tuple[Any, ...]) -> Any:
    return plgpu.BlockSpec(shape, index, transforms=transforms, memory_space=plgpu.SMEM)


def _put_scales(scales: Any, here: Any, absmax: Any, nested: list[Any], blocks: int, per_row: int) -> None:
    """This warpgroup's scales into shared memory."""
    refs = [here, absmax, *nested]
    text = scales_text(blocks, per_row, bool(nested))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (1 + len(refs)))
    def put(_: Any, to: Any, *memory: Any) -> tuple[()]:
        addresses = [_shared(to), *(mgpu.utils.memref_ptr(ref) for ref in memory)]
        constraints = ",".join(["r", *"l" * len(memory), "~{memory}"])
        llvm.inline_asm(ir.Type.parse("!llvm.void"), addresses, text, constraints, has_side_effects=True)
        return ()

    put(scales, *refs)


def _decoded(codes: Any, table: Any, scales: Any, row_bytes: int, scale_row_bytes: int) -> Array:
    """uint8 [64, 32] in shared memory -> bfloat16 weights [64, 64] where wgmma takes them from."""
    shape = (_OUTPUTS, _STEP)
    text = weights_text(row_bytes, scale_row_bytes)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * 3,
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def decode(_: Any, *memory: Any) -> Any:
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        words = llvm.StructType.get_literal([ir.IntegerType.get_signless(32)] * 16)
        constraints = ",".join(["=&r"] * 16 + ["r"] * 3)
        addresses = [_shared(ref) for ref in memory]
        out: Any = llvm.inline_asm(words, addresses, text, constraints, has_side_effects=True)
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        # Tiles of 8 columns, of two rows each; see test_nf4_matmul_mosaic.py.
        flat = registers.reshape(8, 2)
        for i in range(16):
            word = llvm.extractvalue(ir.IntegerType.get_signless(32), out, (i,))
            flat[i % 8, i // 8] = mgpu.utils.bitcast(word, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return decode(codes, table, scales)


def _shared(ref: Any) -> Any:
    """The 32 bits of an address in shared memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))
