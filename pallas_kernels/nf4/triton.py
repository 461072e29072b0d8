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

from pallas_kernels._triton import WHOLE, gpu_reason, triton_call
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor

# Elements that one program decodes: full rows of 4,096 in pairs were the fastest of the tilings tried on an H200.
_TILE, _WARPS = 8192, 4


def unsupported_reason(t: NF4Tensor | NF4Layer) -> str | None:
    """Why t cannot be decoded by this kernel on this device, or None."""
    if isinstance(t, NF4Layer):
        t = t.stack
    elif t.stack_shape:
        return f"it decodes one weight, and this is a stack {t.stack_shape}"
    if t.shape[1] % t.block_size:
        return f"rows of {t.shape[1]} elements are not whole blocks of {t.block_size}"
    return gpu_reason()


def nf4_dequantize_triton(t: NF4Tensor, dtype: Any) -> Array:
    """See `pallas_kernels.nf4.api.dequantize`."""
    return decode_into(None, t, dtype, rows=t.shape[0], columns=t.shape[1])


def decode_into(
    scratch: Array | None, t: NF4Tensor | NF4Layer, dtype: Any, *, rows: int, columns: int, first_row: int = 0
) -> Array:
    """Decode t into [rows, columns], at row `first_row` and column 0; everything else is left as it is.

    Args:
        scratch: [rows, columns] in `dtype`, written in place where the compiler can; None for an array whose other
            elements are undefined.
        t: one weight [n, k], on its own or in its stack, with first_row + n <= rows and k <= columns.
    """
    if isinstance(t, NF4Tensor):
        t = NF4Layer(jax.tree.map(lambda leaf: leaf[None], t), np.int32(0))
    stack, (n, k) = t.stack, t.shape
    tile_columns = _power_of_two_divisor(k, _TILE)
    tile_rows = _power_of_two_divisor(n, max(_TILE // tile_columns, 1))
    block = stack.block_size
    per_tile, per_tile_row, per_row = tile_rows * tile_columns // block, tile_columns // block, k // block
    assert per_tile_row, "whole blocks in a row make tiles of whole blocks"

    def kernel(index_ref: Any, codes_ref: Any, absmax_ref: Any, table_ref: Any, *rest: Any) -> None:
        layer, out_ref = index_ref[0], rest[-1]
        row, column = pl.program_id(0) * tile_rows, pl.program_id(1) * tile_columns

        def tile_of(ref: Any, per_element: int) -> Array:
            columns = pl.ds(column // per_element, tile_columns // per_element)
            return plt.load(ref.at[layer, pl.ds(row, tile_rows), columns])

        codes = tile_of(codes_ref, 2).astype(jnp.int32).reshape(per_tile, block // 2)
        scales = tile_of(absmax_ref, block).reshape(per_tile)
        if stack.is_nested:
            shape = (tile_rows, per_tile_row)
            in_rows, in_columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            nested_index = ((row + in_rows) * per_row + column // block + in_columns) // stack.nested_block_size
            scales = decoded_scales(stack, layer, scales, nested_index.reshape(per_tile), rest)
        high, low = plt.load(table_ref.at[codes >> 4]), plt.load(table_ref.at[codes & 15])
        values = jnp.stack([high * scales[:, None], low * scales[:, None]], axis=-1)
        weights = rounded(values, stack.dtype).astype(dtype).reshape(tile_rows, tile_columns)
        plt.store(out_ref.at[pl.ds(first_row + row, tile_rows), pl.ds(column, tile_columns)], weights)

    operands = [jnp.reshape(t.index, (1,)), stack.codes.reshape(-1, n, k // 2), stack.absmax.reshape(-1, n, per_row)]
    operands += [jnp.asarray(NF4_TABLE)]
    if stack.is_nested:
        operands += [jnp.asarray(DYNAMIC_MAP), stack.nested_absmax, stack.nested_offset]
    aliases = {}
    if scratch is not None:
        aliases = {len(operands): 0}
        operands = [*operands, scratch]
    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(n // tile_rows, k // tile_columns),
        in_specs=[WHOLE] * len(operands),
        out_specs=WHOLE,
        input_output_aliases=aliases,
        num_warps=_WARPS,
        name="nf4_decode",
    )(*operands)


def decoded_scales(stack: NF4Tensor, layer: Array, codes: Array, nested_index: Array, refs: Any) -> Array:
    """Double quantisation undone: what decode_scales of reference.py does, on one tile."""
    map_ref, nested_ref, offset_ref = refs[:3]
    product = plt.load(map_ref.at[codes.astype(jnp.int32)]) * plt.load(nested_ref.at[layer, nested_index])
    # Changes no finite value, but keeps product and sum from becoming one FMA: the format rounds in between.
    product = jnp.maximum(product, np.finfo(np.float32).min)
    offset = plt.load(offset_ref.at[layer])
    total = rounded(product, stack.nested_dtype) + rounded(offset, stack.nested_dtype)
    return rounded(total, stack.nested_dtype)


def _power_of_two_divisor(n: int, limit: int) -> int:
    """The largest power of two that divides n and is at most `limit`."""
    return min(n & -n, limit)


def rounded(values: Array, dtype: str) -> Array:
    """float32 values rounded to what `dtype` holds, as float32."""
    return values if dtype == "float32" else values.astype(dtype).astype(jnp.float32)
