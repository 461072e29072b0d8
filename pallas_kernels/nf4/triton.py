"""NF4 decoding as a Pallas kernel through Triton.

Why it exists: XLA's own decoding reaches half of the memory bandwidth on an H200 and can only make an array of its own;
this one reaches nearly all of it, decodes double-quantised scales on the way, and can write into part of a wider and
taller array, so that several weights and their adapters become one operand of one product. Numerics: the reference's,
to the bit (table values in float32, one rounding; no byte-permute tricks, which round the table first). Refuses weights
whose rows are not whole blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import gpu_reason, triton_call
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE
from pallas_kernels.nf4.tensor import NF4Tensor

# Elements that one program decodes: full rows of 4,096 in pairs were the fastest of the tilings tried on an H200.
_TILE = 8192


def unsupported_reason(t: NF4Tensor) -> str | None:
    """Why t cannot be decoded by this kernel on this device, or None."""
    if t.stack_shape:
        return f"it decodes one weight, and this is a stack {t.stack_shape}"
    if t.shape[1] % t.block_size:
        return f"rows of {t.shape[1]} elements are not whole blocks of {t.block_size}"
    return gpu_reason()


def nf4_dequantize_triton(t: NF4Tensor, dtype: Any) -> Array:
    """See `pallas_kernels.nf4.api.dequantize`."""
    return decode_into(None, t, dtype, rows=t.shape[0], columns=t.shape[1])


def decode_into(
    scratch: Array | None, t: NF4Tensor, dtype: Any, *, rows: int, columns: int, first_row: int = 0
) -> Array:
    """Decode t into [rows, columns], at row `first_row` and column 0; everything else is left as it is.

    Args:
        scratch: [rows, columns] in `dtype`, written in place where the compiler can; None for an array whose other
            elements are undefined.
        t: one weight [n, k] with first_row + n <= rows and k <= columns.
    """
    n, k = t.shape
    tile_columns = _power_of_two_divisor(k, _TILE)
    tile_rows = _power_of_two_divisor(n, max(_TILE // tile_columns, 1))
    block, per_tile = t.block_size, tile_rows * tile_columns // t.block_size
    tile_blocks = tile_columns // block if tile_columns >= block else 0
    assert tile_blocks, "whole blocks in a row make tiles of whole blocks"
    nested = t.is_nested

    def kernel(*refs: Any) -> None:
        codes_ref, absmax_ref, table_ref = refs[:3]
        out_ref = refs[-1]
        codes = codes_ref[...].astype(jnp.int32).reshape(per_tile, block // 2)
        scales = absmax_ref[...].reshape(per_tile)
        if nested:
            map_ref, nested_ref, offset_ref = refs[3:6]
            row = pl.program_id(0) * tile_rows + jax.lax.broadcasted_iota(jnp.int32, (tile_rows, tile_blocks), 0)
            column = pl.program_id(1) * tile_blocks
            column += jax.lax.broadcasted_iota(jnp.int32, (tile_rows, tile_blocks), 1)
            nested_index = ((row * (k // block) + column) // t.nested_block_size).reshape(per_tile)
            product = plt.load(map_ref.at[scales.astype(jnp.int32)]) * plt.load(nested_ref.at[nested_index])
            # Changes no finite value, but keeps product and sum from becoming one FMA: the format rounds in between.
            product = jnp.maximum(product, np.finfo(np.float32).min)
            offset = plt.load(offset_ref.at[jnp.zeros((per_tile,), jnp.int32)])
            scales = _rounded(_rounded(product, t.nested_dtype) + _rounded(offset, t.nested_dtype), t.nested_dtype)
        high, low = plt.load(table_ref.at[codes >> 4]), plt.load(table_ref.at[codes & 15])
        values = jnp.stack([high * scales[:, None], low * scales[:, None]], axis=-1)
        at_rows = pl.ds(first_row + pl.program_id(0) * tile_rows, tile_rows)
        at_columns = pl.ds(pl.program_id(1) * tile_columns, tile_columns)
        plt.store(
            out_ref.at[at_rows, at_columns], _rounded(values, t.dtype).astype(dtype).reshape(tile_rows, tile_columns)
        )

    whole = [pl.BlockSpec(memory_space=pl.ANY)]
    operands: list[Any] = [t.codes.reshape(n, k // 2), t.absmax.reshape(n, k // block), jnp.asarray(NF4_TABLE)]
    specs = [
        pl.BlockSpec((tile_rows, tile_columns // 2), lambda i, j: (i, j)),
        pl.BlockSpec((tile_rows, tile_blocks), lambda i, j: (i, j)),
        *whole,
    ]
    if nested:
        operands += [jnp.asarray(DYNAMIC_MAP), t.nested_absmax, t.nested_offset.reshape(1)]
        specs += whole * 3
    aliases = {}
    if scratch is not None:
        aliases = {len(operands): 0}
        operands, specs = [*operands, scratch], [*specs, *whole]
    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(n // tile_rows, k // tile_columns),
        in_specs=specs,
        out_specs=whole[0],
        input_output_aliases=aliases,
        num_warps=4,
        name="nf4_decode",
    )(*operands)


def _power_of_two_divisor(n: int, limit: int) -> int:
    """The largest power of two that divides n and is at most `limit`."""
    return min(n & -n, limit)


def _rounded(values: Array, dtype: str) -> Array:
    return values if dtype == "float32" else values.astype(dtype).astype(jnp.float32)
