"""NF4 weights decoded to e4m3 as a Pallas kernel through Triton, along either axis.

Why it exists: both operands of an 8-bit product must lie along the contraction, so the backward pass needs the weight
transposed, which here costs nothing more than the kernel's own writes; and several weights are written into one
operand. Numerics: the reference's, to the bit. Refuses weights whose rows are not whole blocks, and GPUs before Ada.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, triton_call
from pallas_kernels.fp8_matmul.reference import E4M3
from pallas_kernels.fp8_matmul.triton_rows import e4m3_reason
from pallas_kernels.fp8_matmul.xla import block_scales
from pallas_kernels.nf4 import NF4_TABLE, NF4Layer, NF4Tensor
from pallas_kernels.nf4.tensor import as_layer
from pallas_kernels.nf4.triton import unsupported_reason as decode_reason

# Elements that one program decodes; of a transposed weight in tiles of so many rows, which are written beside each
# other.
_TILE, _TRANSPOSED_ROWS = 8192, 128


def unsupported_reason(w: Any) -> str | None:
    """Why a weight cannot be decoded by this kernel on this device, or None."""
    if not isinstance(w, NF4Tensor | NF4Layer):
        return "a dense weight has nothing to decode"
    return decode_reason(w) or e4m3_reason()


def decode_triton(weights: list[Any], transposed: bool) -> tuple[Array, Array]:
    """e4m3 [sum of N, K], or [K, sum of N], and the scales of all N rows: the weights below, or beside, each other."""
    rows, width = sum(w.shape[0] for w in weights), weights[0].shape[1]
    scratch: Any = None
    scales, first = [], 0
    for w in weights:
        scratch, of_rows = _decode_into(scratch, w, (width, rows) if transposed else (rows, width), first, transposed)
        scales.append(of_rows)
        first += w.shape[0]
    return scratch, jnp.concatenate(scales)


def _decode_into(
    scratch: Array | None, w: NF4Tensor | NF4Layer, shape: tuple[int, int], first: int, transposed: bool
) -> tuple[Array, Array]:
    w = as_layer(w)
    stack, (n, k) = w.stack, w.shape
    block, factors_and_rows = stack.block_size, block_scales(w.picked())
    tile_columns = block if transposed else _power_of_two_divisor(k, _TILE)
    tile_rows = _power_of_two_divisor(n, _TRANSPOSED_ROWS if transposed else max(_TILE // tile_columns, 1))
    blocks = tile_rows * tile_columns // block
    assert blocks, "whole blocks in a row make tiles of whole blocks"

    def kernel(index_ref: Any, codes_ref: Any, factors_ref: Any, table_ref: Any, *rest: Any) -> None:
        row, column = pl.program_id(0) * tile_rows, pl.program_id(1) * tile_columns
        in_rows = pl.ds(row, tile_rows)
        codes = plt.load(codes_ref.at[index_ref[0], in_rows, pl.ds(column // 2, tile_columns // 2)])
        codes = codes.astype(jnp.int32).reshape(blocks, block // 2)
        factors = plt.load(factors_ref.at[in_rows, pl.ds(column // block, tile_columns // block)]).reshape(blocks, 1)
        high, low = plt.load(table_ref.at[codes >> 4]), plt.load(table_ref.at[codes & 15])
        values = jnp.stack([high * factors, low * factors], axis=-1).reshape(tile_rows, tile_columns).astype(E4M3)
        if transposed:
            plt.store(rest[-1].at[pl.ds(column, tile_columns), pl.ds(first + row, tile_rows)], values.T)
        else:
            plt.store(rest[-1].at[pl.ds(first + row, tile_rows), pl.ds(column, tile_columns)], values)

    factors, of_rows = factors_and_rows
    operands = [jnp.reshape(w.index, (1,)), stack.codes.reshape(-1, n, k // 2), factors, jnp.asarray(NF4_TABLE)]
    operands += [] if scratch is None else [scratch]
    decoded = triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, E4M3),
        grid=(n // tile_rows, k // tile_columns),
        in_specs=[WHOLE] * len(operands),
        out_specs=WHOLE,
        input_output_aliases={} if scratch is None else {len(operands) - 1: 0},
        num_warps=4,
        name="nf4_decode_fp8",
    )(*operands)
    return decoded, of_rows


def _power_of_two_divisor(n: int, limit: int) -> int:
    """The largest power of two that divides n and is at most `limit`."""
    return min(n & -n, limit)
