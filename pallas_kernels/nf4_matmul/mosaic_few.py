"""Products of up to 16 rows with NF4 weights, several weights and their adapters in one launch (PTX through Mosaic).

Why it exists: few rows wait for the weights' bytes, and decoding them is what keeps a multiprocessor busy: seven
instructions for a weight through Triton, less than four here. Each block of threads stays on its multiprocessor and
takes tiles of 16 rows of the weights in turn; codes of the next ones are under way (`cp.async`), each warp's own. A
byte of codes is looked up as a pair of values in a table that each bank of shared memory holds a copy of. The pairs are
operands of `mma`, whose sums of a scale's 64 columns are scaled in float32; the order of columns in a sum is free, so
that canonical bytes need no rearranging. Warps share the columns and add up. Each keeps its part of x in registers
where they share up to 4,096 columns; where there are more, x comes with each tile, and more than 8 rows are too many.
Numerics: the table is rounded to bfloat16, the scale is not, sums are float32; adapters (up, low) are bfloat16.
Results repeat bit for bit. Refuses what is not bfloat16 in blocks of 64 and rows of whole chunks of 256 columns, GPUs
other than Hopper, and JAX before 0.11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels._device import multiprocessors
from pallas_kernels._mosaic import hopper_reason
from pallas_kernels._ptx import launch
from pallas_kernels._stack import StackLayer, as_stack_layer
from pallas_kernels.nf4.reference import DYNAMIC_MAP
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.nf4_matmul.few_program import BLOCK, CHUNK, TILE, Launch, Member, program
from pallas_kernels.nf4_matmul.lookup import bits_in

# More are faster through wgmma (mosaic_gpu.py).
_MOST_ROWS, _MOST_ROWS_READ_AGAIN = 16, 8
_MOST_WARPS = 16
_WIDTHS = {"bfloat16": False, "float32": True}


def unsupported_reason(x: Any, weights: Sequence[Any], ups: Sequence[Any] | None = None) -> str | None:
    """Why x [M, K] and these weights [N, K] (arrays or shapes) cannot be multiplied here, or None."""
    if (reason := hopper_reason()) is not None:
        return reason
    most = _MOST_ROWS if x.shape[1] <= _MOST_WARPS * CHUNK else _MOST_ROWS_READ_AGAIN
    if not 1 <= x.shape[0] <= most:
        return f"it serves 1 to {most} rows of {x.shape[1]} columns, not {x.shape[0]}"
    if x.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, and x is {x.dtype}"
    stacks = [w.stack if isinstance(w, NF4Layer) else w for w in weights]
    for stack in stacks:
        if not isinstance(stack, NF4Tensor) or stack.block_size != BLOCK or stack.nested_dtype != "float32":
            return f"it multiplies by packed weights in blocks of {BLOCK} with scales of float32"
        if stack.dtype != "bfloat16":
            return f"it computes in bfloat16, and a weight is {stack.dtype}"
        if stack.shape[0] % TILE or stack.shape[1] % CHUNK:
            return f"its tiles of {TILE} x {CHUNK} do not divide a weight {stack.shape}"
    if len({stack.is_nested for stack in stacks}) > 1:
        return "some of the weights are quantised twice, others are not"
    given = [up for up in ups or () if up is not None]
    if any(up.shape[1] % 2 for up in given):
        return "it reads adapters in pairs, and the rank of one is odd"
    if len({up.dtype for up in given}) > 1 or any(up.dtype.name not in _WIDTHS for up in given):
        return f"it takes adapters of one dtype out of {', '.join(_WIDTHS)}"
    return None


def few_rows(
    x: Array,
    weights: Sequence[NF4Tensor | NF4Layer],
    ups: Sequence[Array | StackLayer | None] | None = None,
    low: Array | None = None,
    dtype: Any = None,
) -> Array:
    """[M, K] times several weights [N, K] in one launch: their results beside each other, [M, sum of N].

    ups: of each weight a matrix [N, R] that is added along the contraction, or None. low: [M, sum of R or more], what
    the ups are multiplied by, in their order; of one row also several, float32, that add up. dtype: of the result, or
    None for x's own.
    """
    m, k = x.shape
    low = x[:, :0] if low is None else low
    parts = low.shape[0] // m if low.size else 1
    if parts > 1 and (len(weights) > 1 or low.dtype != jnp.float32):
        low, parts = jnp.sum(low, axis=0, keepdims=True), 1
    low = jnp.pad(low, ((0, 0), (0, low.shape[1] % 2)))  # read in pairs
    operands: list[Any] = [x, jnp.asarray(pairs()), jnp.asarray(DYNAMIC_MAP), low if low.size else x]
    members: list[Member] = []
    row = column = 0
    given = ups or [None] * len(weights)
    for w, up in zip(weights, given, strict=True):
        layer, rank = w if isinstance(w, NF4Layer) else NF4Layer(w, np.int32(0)), 0 if up is None else up.shape[1]
        stack = layer.stack
        members.append(Member(w.shape[0], row, len(operands), rank, column))
        operands += [_as_operand(layer.index), stack.codes, stack.absmax]
        operands += [stack.nested_absmax, jnp.reshape(stack.nested_offset, (-1,))] if stack.is_nested else []
        if up is not None:
            up = as_stack_layer(up)
            operands += [_as_operand(up.index), up.stack]
        row, column = row + w.shape[0], column + rank
    out = jax.ShapeDtypeStruct((m, row), dtype or x.dtype)
    wide = (low.dtype == jnp.float32, any(up is not None and up.dtype == jnp.float32 for up in given))
    grid, warps = min(multiprocessors(), row // TILE), min(_MOST_WARPS, -(-k // CHUNK // 4) * 4)
    widths = *wide, _WIDTHS[np.dtype(out.dtype).name]
    how = Launch(m, k, tuple(members), layer.stack.is_nested, low.shape[1], *widths, grid, warps, parts)
    return launch(program(how), operands, out, grid=grid, warps=warps, shared=how.shared_bytes, name="nf4_matmul_few")


def _as_operand(index: Any) -> Array:
    return jnp.reshape(jnp.asarray(index, jnp.int32), (1,))


def pairs() -> np.ndarray:
    """int32 [256]: both values of a byte of codes in bfloat16, the high nibble's in the low half."""
    bits, codes = bits_in(jnp.bfloat16).astype(np.uint32), np.arange(256)
    return (bits[codes >> 4] | bits[codes & 15] << 16).view(np.int32)
