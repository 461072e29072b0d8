"""NF4 decoding as a Pallas kernel through Triton.

Why it exists: XLA's own decoding reaches half of the memory bandwidth on an H200 and can only make an array of its own;
this one decodes double-quantised scales on the way, and can write into part of a wider and taller array, so that some
weights and their adapters become one operand of one product (speed: benchmarks/NOTES.md). Numerics: the reference's,
to the bit (table values in float32, one rounding; no byte-permute tricks, which round the table first). Refuses weights
whose rows are not whole blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, gpu_reason, triton_call
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor, as_layer

# Elements that one program decodes, of blocks that follow each other, and its warps.
_TILE, _WARPS = 4096, 4


def unsupported_reason(t: NF4Tensor | NF4Layer) -> str | None:
    """Why t cannot be decoded by this kernel on this device, or None."""
    if isinstance(t, NF4Layer):
        first, columns = t.place[2:]
        if first % t.stack.block_size or columns % t.stack.block_size:
            return f"columns {first} to {first + columns} are not whole blocks of {t.stack.block_size}"
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
        t: one weight [n, k], on its own or in its stack, or a part of one, with first_row + n <= rows and k <= columns.
    """
    t = as_layer(t)
    stack, (n, k), block = t.stack, t.stack.shape, t.stack.block_size
    top, height, left, width = t.place
    half, per_row = block // 2, width // block
    per_tile = _power_of_two_divisor(height * per_row, max(_TILE // block, 1))

    def kernel(index_ref: Any, codes_ref: Any, absmax_ref: Any, table_ref: Any, *rest: Any) -> None:
        layer, out_ref = index_ref[0], rest[-1]
        blocks = pl.program_id(0) * per_tile + lax.iota(jnp.int32, per_tile)
        row, column = blocks // per_row, blocks % per_row
        source_row, source = top + row, left // block + column

        def within(column: Array, size: int) -> Array:
            """Columns of the blocks' parts of this size."""
            return column[:, None] * size + lax.broadcasted_iota(jnp.int32, (per_tile, size), 1)

        # Addressed as [blocks, elements]: reshaping a tile of rows would send it through shared memory three times.
        codes = plt.load(codes_ref.at[layer, source_row[:, None], within(source, half)]).astype(jnp.int32)
        scales = plt.load(absmax_ref.at[layer, source_row, source])
        if stack.is_nested:
            of_weight = blocks if t.part is None else source_row * (k // block) + source
            scales = decoded_scales(stack, layer, scales, of_weight // stack.nested_block_size, rest)
        high, low = (plt.load(table_ref.at[code]) * scales[:, None] for code in (codes >> 4, codes & 15))
        weights = jnp.stack([rounded(part, stack.dtype).astype(dtype) for part in (high, low)], axis=-1)
        plt.store(out_ref.at[first_row + row[:, None], within(column, block)], weights.reshape(per_tile, block))

    operands = [jnp.reshape(t.index, (1,)), stack.codes.reshape(-1, n, k // 2), stack.absmax.reshape(-1, n, k // block)]
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
        grid=(height * per_row // per_tile,),
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
