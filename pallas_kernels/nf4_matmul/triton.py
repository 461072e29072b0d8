"""Products with an NF4 weight through Triton: decoded in the product itself for few rows, before it for many.

Why it exists: up to 64 rows the packed bytes are what a product waits for, and a decoded weight is eight times as much
to move (written, then read). One row sums in float32 lanes and no tensor core; several multiply by tiles of decoded
weights that never leave the multiprocessor; more rows than that decode into a scratch and leave the product to cuBLAS.
Numerics: sums are float32, rounded once to x's dtype; their order depends on shapes alone, so results repeat bit for
bit. Up to 64 rows of 16 bits the table is rounded before it is multiplied by the scale (of several rows, rounded too),
where the reference rounds the weight; otherwise weights are rounded as the reference's. Refuses weights whose rows are
not whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._stack import StackLayer, as_stack_layer, picked
from pallas_kernels._triton import WHOLE, masked_span, triton_call
from pallas_kernels.nf4.reference import DYNAMIC_MAP
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor, as_layer
from pallas_kernels.nf4.triton import decode_into, decoded_scales, rounded
from pallas_kernels.nf4.triton import unsupported_reason as decode_reason
from pallas_kernels.nf4_matmul.lookup import table_of, table_values

# Rows of x up to which the weight is decoded inside of the product.
FUSED_ROWS = 64
# Weight rows and columns that one program decodes at a time, for one row of x and for several: the fastest on an H200.
_ROW_TILE, _ROW_WIDTH, _MOST_UNROLLED = 8, 1024, 16
_TILE, _WIDTH, _MOST_PARTS = 64, 128, 4
_BLOCK_LIMIT = 128


def unsupported_reason(x: Array, w: NF4Tensor | NF4Layer) -> str | None:
    """Why x and w cannot be multiplied here, or None."""
    if x.size == 0:
        return f"x of shape {x.shape} holds nothing"
    return decode_reason(w)


def nf4_matmul_triton(x: Array, w: NF4Tensor | NF4Layer) -> Array:
    """y = x W^T: [..., in] -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    y = fused_product(rows, w) if can_fuse(rows, w) else _product(rows, w, 1)
    return y.reshape(*x.shape[:-1], -1)


def nf4_matmul_transposed_triton(dy: Array, w: NF4Tensor | NF4Layer) -> Array:
    """dX = dY W: [..., out] -> [..., in]."""
    return _product(dy.reshape(-1, dy.shape[-1]), w, 0).reshape(*dy.shape[:-1], -1)


def can_fuse(x: Array, w: NF4Tensor | NF4Layer) -> bool:
    """Whether x [M, K] has so few rows that the product decodes the weight itself."""
    block = (w.stack if isinstance(w, NF4Layer) else w).block_size
    # Tensor cores would round float32 operands to fewer bits, and take no fewer than 16 columns.
    several = x.shape[0] <= FUSED_ROWS and x.dtype != jnp.float32 and w.shape[0] >= 16
    return block <= _BLOCK_LIMIT and (x.shape[0] == 1 or several)


def _product(x: Array, w: NF4Tensor | NF4Layer, weight_axis: int) -> Array:
    n, k = w.shape
    # Tied to x, or XLA may decode the weights of all layers before the first one runs.
    (w, x) = lax.optimization_barrier((w, x)) if isinstance(w, NF4Tensor) else (w, x)
    weight = decode_into(None, w, x.dtype, rows=n, columns=k)
    contract = (((1,), (weight_axis,)), ((), ()))
    return lax.dot_general(x, weight, contract)


def fused_product(x: Array, w: NF4Tensor | NF4Layer, dtype: Any = None) -> Array:
    """[M, K] -> [M, N], the weight decoded in the kernel; for x that `can_fuse`. dtype: of the result, or None for x's
    own."""
    return fused_row(x, [w], dtype=dtype) if x.shape[0] == 1 else _few_rows(x, as_layer(w), dtype or x.dtype)


def _operands(x: Array, w: NF4Layer, table: np.ndarray) -> list[Array]:
    stack, (n, k) = w.stack, w.shape
    operands = [jnp.reshape(w.index, (1,)), x, stack.codes.reshape(-1, n, k // 2)]
    operands += [stack.absmax.reshape(-1, n, k // stack.block_size), jnp.asarray(table)]
    if stack.is_nested:
        operands += [jnp.asarray(DYNAMIC_MAP), stack.nested_absmax, stack.nested_offset]
    return operands


def _tile_of(n: int, most: int) -> int:
    """The power of two of weight rows that one program takes."""
    return min(most, 1 << (n.bit_length() - 1))


def _first_row(number: Array, tile: int, n: int) -> Array:
    """Where a program's rows begin: the last ones' overlap with those before, and both write the same values."""
    return number * tile if n % tile == 0 else jnp.minimum(number * tile, n - tile)


def _scales(stack: NF4Tensor, layer: Array, first: Array, block: Array, shape: tuple[int, int], refs: Any) -> Array:
    """float32 `shape`: the scales of rows from `first` and of a row's blocks from `block` on."""
    absmax_ref, _, *nested_refs = refs
    scales = plt.load(absmax_ref.at[layer, pl.ds(first, shape[0]), pl.ds(block, shape[1])])
    if not stack.is_nested:
        return scales
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    number = (first + row) * (stack.shape[1] // stack.block_size) + block + column
    index = (number // stack.nested_block_size).reshape(-1)
    return decoded_scales(stack, layer, scales.reshape(-1), index, nested_refs).reshape(shape)


def fused_row(
    x: Array,
    weights: Sequence[NF4Tensor | NF4Layer],
    ups: Sequence[Array | StackLayer | None] | None = None,
    low: Array | None = None,
    dtype: Any = None,
) -> Array:
    """One row [1, K] times several weights [N, K] in one launch: their results beside each other, [1, sum of N].

    ups: of each weight a matrix [N, R] that is added along the contraction, or None. low: [1, sum of R], what the ups
    are multiplied by, in their order. dtype: of the result, or None for x's own.
    """
    layers = [as_layer(w) for w in weights]
    ups, k = ups or [None] * len(layers), x.shape[1]
    members: list[tuple[NF4Tensor, int, int, int, int, int, int, int]] = []
    operands: list[Any] = []
    lows: list[Array] = []
    programs = rows = column = 0
    for w, up in zip(layers, ups, strict=True):
        n, stack = w.shape[0], w.stack
        tile = _tile_of(n, _ROW_TILE)
        of_member = [jnp.reshape(w.index, (1,)), stack.codes.reshape(-1, n, k // 2)]
        of_member += [stack.absmax.reshape(-1, n, k // stack.block_size)]
        of_member += [stack.nested_absmax, stack.nested_offset] if stack.is_nested else []
        rank, padded = (0, 0) if up is None else (up.shape[1], pl.next_power_of_2(up.shape[1]))
        if up is not None:
            assert low is not None
            # Triton has blocks of powers of two.
            stacked = up if rank == padded else jnp.pad(picked(up), ((0, 0), (0, padded - rank)))
            stacked = as_stack_layer(stacked)
            of_member += [stacked.stack, jnp.reshape(stacked.index, (1,))]
            start = sum(each.shape[1] for each in ups[: len(members)] if each is not None)
            lows += [jnp.pad(low[0, start : start + rank], (0, padded - rank))]
        members.append((stack, n, tile, programs, rows, len(operands), column, padded))
        operands += of_member
        programs, rows, column = programs + pl.cdiv(n, tile), rows + n, column + padded
    shared = [x.reshape(-1), jnp.asarray(table_of(x.dtype, for_sums=True)), jnp.asarray(DYNAMIC_MAP)]
    if lows:
        assert low is not None
        shared.append(low[0] if column == low.shape[1] else jnp.concatenate(lows))

    def kernel(*refs: Any) -> None:
        number, (x_ref, table_ref, map_ref, *low_refs), out_ref = pl.program_id(0), refs[: len(shared)], refs[-1]

        def run(stack: NF4Tensor, n: int, tile: int, program: int, row: int, at: int, column: int, rank: int) -> None:
            index_ref, codes_ref, absmax_ref, *more = refs[len(shared) + at : -1]
            first, layer = _first_row(number - program, tile, n), index_ref[0]
            scale_refs = (absmax_ref, table_ref, map_ref, *more[: 2 * stack.is_nested])
            y = _row_sums(x_ref, codes_ref, scale_refs, stack, layer, first, tile)
            if rank:
                up_ref, at_ref = more[2 * stack.is_nested :][:2]
                up = plt.load(up_ref.at[at_ref[0], pl.ds(first, tile)]).astype(jnp.float32)
                low = plt.load(low_refs[0].at[pl.ds(column, rank)]).astype(jnp.float32)
                y += jnp.sum(up * low[None], axis=1)
            plt.store(out_ref.at[pl.ds(row + first, tile)], y.astype(out_ref.dtype))

        if len(members) == 1:
            run(*members[0])
            return
        for member, end in zip(members, [*(later[3] for later in members[1:]), programs], strict=True):
            pl.when((number >= member[3]) & (number < end))(partial(run, *member))

    width = min(k & -k, _ROW_WIDTH)
    y = triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows,), dtype or x.dtype),
        grid=(programs,),
        in_specs=[WHOLE] * (len(shared) + len(operands)),
        out_specs=WHOLE,
        # At least four bytes of codes, which are looked up at once, for each thread.
        num_warps=max(1, min(8, max(m[2] for m in members) * width // 2 // 128)),
        num_stages=3,
        name="nf4_matmul_row",
    )(*shared, *operands)
    return y[None]


def _row_sums(
    x_ref: Any, codes_ref: Any, scale_refs: Any, stack: NF4Tensor, layer: Array, first: Array, tile: int
) -> Array:
    """float32 [tile]: x times the weight's rows from `first` on. scale_refs: as `_scales` takes them."""
    k, block = stack.shape[1], stack.block_size
    width = min(k & -k, _ROW_WIDTH)
    steps, shape = k // width, (tile, width // block)

    def add(step: Array, sums: Array) -> Array:
        codes = plt.load(codes_ref.at[layer, pl.ds(first, tile), pl.ds(step * (width // 2), width // 2)])
        row = plt.load(x_ref.at[pl.ds(step * width, width)])
        scales = _scales(stack, layer, first, step * shape[1], shape, scale_refs)
        values = jnp.stack(table_values(codes, scale_refs[1], row.dtype, for_sums=True), axis=-1)
        if row.dtype == jnp.float32:
            # As exact as the reference, so rounded as it rounds.
            values = values.reshape(tile * shape[1], block) * scales.reshape(-1)[:, None]
            values, scales = rounded(values, stack.dtype), jnp.ones_like(scales)
        products = values.reshape(tile, width) * row.astype(jnp.float32)[None, :]
        return sums + jnp.sum(products.reshape(tile * shape[1], block), axis=1).reshape(shape) * scales

    sums = jnp.zeros(shape, jnp.float32)
    if steps > _MOST_UNROLLED:
        return jnp.sum(lax.fori_loop(0, steps, add, sums), axis=1)
    for step in range(steps):
        sums = add(jnp.int32(step), sums)
    return jnp.sum(sums, axis=1)


def _few_rows(x: Array, w: NF4Layer, dtype: Any) -> Array:
    stack, (n, k), m = w.stack, w.shape, x.shape[0]
    tile, width = _tile_of(n, _TILE), min(k & -k, _WIDTH)
    block, rows = stack.block_size, max(16, pl.next_power_of_2(m))
    blocks = width // block
    # Parts of the columns, each with programs of its own: weights of some thousand rows would not fill a GPU.
    split = max(s for s in range(1, _MOST_PARTS + 1) if (k // width) % s == 0)
    steps = k // width // split

    def kernel(index_ref: Any, x_ref: Any, codes_ref: Any, *refs: Any) -> None:
        layer, out_ref, first = index_ref[0], refs[-1], _first_row(pl.program_id(0), tile, n)
        part = pl.program_id(1)

        def inside(columns: int) -> Array:
            return lax.broadcasted_iota(jnp.int32, (rows, columns), 0) < m

        def add(step: Array, sums: Array) -> Array:
            step = part * steps + step
            codes = plt.load(codes_ref.at[layer, pl.ds(first, tile), pl.ds(step * (width // 2), width // 2)])
            at = (masked_span(0, rows, step), pl.ds(step * width, width))
            some = plt.load(x_ref.at[at], mask=inside(width), other=0.0) if m < rows else plt.load(x_ref.at[at])
            scales = _scales(stack, layer, first, step * blocks, (tile, blocks), refs[:-1])
            scales = scales.reshape(tile * blocks)[:, None].astype(x.dtype)
            halves = table_values(codes.reshape(tile * blocks, block // 2), refs[1], x.dtype)
            weights = jnp.stack([half * scales for half in halves], axis=-1).reshape(tile, width)
            return sums + plt.dot(some, weights, trans_b=True)

        sums = lax.fori_loop(0, steps, add, jnp.zeros((rows, tile), jnp.float32))
        at = out_ref.at[part, masked_span(0, rows, first), pl.ds(first, tile)]
        plt.store(at, sums.astype(out_ref.dtype), mask=inside(tile) if m < rows else None)

    operands = _operands(x, w, table_of(x.dtype))
    parts = triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((split, m, n), dtype if split == 1 else jnp.float32),
        grid=(pl.cdiv(n, tile), split),
        in_specs=[WHOLE] * len(operands),
        out_specs=WHOLE,
        num_warps=4,
        num_stages=3,
        name="nf4_matmul",
    )(*operands)
    return parts[0] if split == 1 else jnp.sum(parts, axis=0).astype(dtype)
