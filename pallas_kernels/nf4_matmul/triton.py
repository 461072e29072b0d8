"""Products with an NF4 weight through Triton: decoded in the product itself for few rows, before it for many.

Why it exists: up to 64 rows the packed bytes are what a product waits for, and a decoded weight is eight times as much
to move (written, then read). One row sums in float32 lanes and no tensor core; several multiply by tiles of decoded
weights that never leave the multiprocessor; more rows than that decode into a scratch and leave the product to cuBLAS.
Numerics: weights are decoded and rounded as the reference's, sums are float32, rounded once to x's dtype. The order of
a sum depends on shapes alone, so results repeat bit for bit. Refuses weights whose rows are not whole blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, masked_span, triton_call
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.nf4.triton import decode_into, decoded_scales, rounded
from pallas_kernels.nf4.triton import unsupported_reason as decode_reason

# Rows of x up to which the weight is decoded inside of the product.
FUSED_ROWS = 64
# Bytes of codes that one program decodes at a time: of 8 weight rows for one row of x, of 64 for several.
_ROW_TILE, _ROW_BYTES = 8, 512
_TILE, _TILE_BYTES = 64, 64
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
    # A tensor core would round float32 operands to fewer bits.
    return block <= _BLOCK_LIMIT and (x.shape[0] == 1 or (x.shape[0] <= FUSED_ROWS and x.dtype != jnp.float32))


def _product(x: Array, w: NF4Tensor | NF4Layer, weight_axis: int) -> Array:
    n, k = w.shape
    # Tied to x, or XLA may decode the weights of all layers before the first one runs.
    (w, x) = lax.optimization_barrier((w, x)) if isinstance(w, NF4Tensor) else (w, x)
    weight = decode_into(None, w, x.dtype, rows=n, columns=k)
    contract = (((1,), (weight_axis,)), ((), ()))
    return lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32).astype(x.dtype)


def fused_product(x: Array, w: NF4Tensor | NF4Layer) -> Array:
    """[M, K] -> [M, N], the weight decoded in the kernel; for x that `can_fuse`."""
    if isinstance(w, NF4Tensor):
        w = NF4Layer(jax.tree.map(lambda leaf: leaf[None], w), np.int32(0))
    stack, (n, k), m = w.stack, w.shape, x.shape[0]
    block, one_row = stack.block_size, m == 1
    tile = _ROW_TILE if one_row else _TILE
    width = min(k & -k, 2 * (_ROW_BYTES if one_row else _TILE_BYTES))
    blocks, m_tile = width // block, max(16, pl.next_power_of_2(m))
    assert blocks, "whole blocks in a row, of sizes that are powers of two, make tiles of whole blocks"

    def kernel(index_ref: Any, even_ref: Any, odd_ref: Any, codes_ref: Any, absmax_ref: Any, *rest: Any) -> None:
        layer, table_ref, out_ref = index_ref[0], rest[0], rest[-1]
        first = pl.program_id(0) * tile
        # Rows beyond the last are read as the last one, and not written.
        row = jnp.minimum(first + lax.broadcasted_iota(jnp.int32, (tile, blocks), 0), n - 1)

        def decoded(step: Array) -> tuple[Array, Array]:
            """Weights of even and of odd columns, float32 [tile * blocks, block / 2]."""
            at = step * blocks + lax.broadcasted_iota(jnp.int32, (tile, blocks), 1)
            scales = plt.load(absmax_ref.at[layer, row, at]).reshape(tile * blocks)
            if stack.is_nested:
                nested_index = (row * (k // block) + at) // stack.nested_block_size
                scales = decoded_scales(stack, layer, scales, nested_index.reshape(tile * blocks), rest[1:])
            in_tile = (tile * blocks, block // 2)
            number, byte = (lax.broadcasted_iota(jnp.int32, in_tile, axis) for axis in (0, 1))
            code_row = jnp.minimum(first + number // blocks, n - 1)
            column = (step * blocks + number % blocks) * (block // 2) + byte
            codes = plt.load(codes_ref.at[layer, code_row, column]).astype(jnp.int32)
            halves = (plt.load(table_ref.at[codes >> 4]), plt.load(table_ref.at[codes & 15]))
            even, odd = (rounded(half * scales[:, None], stack.dtype) for half in halves)
            return even, odd

        out_columns = first + lax.iota(jnp.int32, tile)
        if one_row:

            def add_row(step: Array, sums: Array) -> Array:
                number, byte = (lax.broadcasted_iota(jnp.int32, sums.shape, axis) for axis in (0, 1))
                at = (step * blocks + number % blocks) * (block // 2) + byte
                even, odd = (rounded(half, x.dtype.name) for half in decoded(step))
                x_even, x_odd = (plt.load(ref.at[step * 0, at]).astype(jnp.float32) for ref in (even_ref, odd_ref))
                return sums + even * x_even + odd * x_odd

            sums = lax.fori_loop(0, k // width, add_row, jnp.zeros((tile * blocks, block // 2), jnp.float32))
            y = jnp.sum(jnp.sum(sums, axis=1).reshape(tile, blocks), axis=1)
            plt.store(out_ref.at[first * 0, pl.ds(first, tile)], y.astype(out_ref.dtype), mask=out_columns < n)
            return

        def add_tile(step: Array, sums: Array) -> Array:
            at = pl.ds(step * (width // 2), width // 2)
            x_rows = lax.broadcasted_iota(jnp.int32, (m_tile, width // 2), 0)
            for half, ref in zip(decoded(step), (even_ref, odd_ref), strict=True):
                weights = half.astype(x.dtype).reshape(tile, width // 2)
                some = plt.load(ref.at[masked_span(0, m_tile, step), at], mask=x_rows < m, other=0.0)
                sums += plt.dot(weights, some, trans_b=True)
            return sums

        sums = lax.fori_loop(0, k // width, add_tile, jnp.zeros((tile, m_tile), jnp.float32))
        inside = (lax.iota(jnp.int32, m_tile) < m)[:, None] & (out_columns < n)[None, :]
        at = out_ref.at[masked_span(0, m_tile, first), pl.ds(first, tile)]
        plt.store(at, sums.T.astype(out_ref.dtype), mask=inside)

    operands = [jnp.reshape(w.index, (1,)), x[:, 0::2], x[:, 1::2]]
    operands += [stack.codes.reshape(-1, n, k // 2), stack.absmax.reshape(-1, n, k // block), jnp.asarray(NF4_TABLE)]
    if stack.is_nested:
        operands += [jnp.asarray(DYNAMIC_MAP), stack.nested_absmax, stack.nested_offset]
    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(pl.cdiv(n, tile),),
        in_specs=[WHOLE] * len(operands),
        out_specs=WHOLE,
        num_warps=4,
        num_stages=3,
        name="nf4_matmul_row" if one_row else "nf4_matmul",
    )(*operands)
