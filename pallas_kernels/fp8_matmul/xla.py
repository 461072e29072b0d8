"""Products of e4m3 matrices, and weights decoded for them, through XLA.

Why it exists: on Hopper and newer XLA makes a product of e4m3 matrices that both lie along the contraction a call of
cuBLASLt, which runs at twice bf16's rate; elsewhere it widens them, so that every machine computes the same. Decoding
runs everywhere and is what the kernel is measured against. Numerics: the reference's, but that a result in bf16 is
rounded once more, before the scales are multiplied in. Refuses nothing.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.fp8_matmul.reference import E4M3, row_scales
from pallas_kernels.nf4 import NF4_TABLE, NF4Tensor
from pallas_kernels.nf4.reference import decode_scales
from pallas_kernels.nf4.xla import unpacked

LowRank = tuple[Array, Array]


def raw_product(a: Array, b: Array, dtype: Any) -> Array:
    """a b^T of e4m3 [M, K] and [N, K] without their scales, in a dtype that its sums are within the range of."""
    # Unscaled sums are within bfloat16's range, and beyond float16's.
    raw = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=raw)


def finish_xla(raw: Array, row_scale: Array, column_scale: Array | None, low_rank: LowRank | None, dtype: Any) -> Array:
    """raw [M, N] times its rows' scales and its columns' in `dtype`, plus t b^T of low_rank = (t [M, R], b [N, R])."""
    scale = row_scale[:, None] if column_scale is None else row_scale[:, None] * column_scale
    y = (raw.astype(jnp.float32) * scale).astype(dtype)
    if low_rank is None:
        return y
    t, b = low_rank
    return y + lax.dot_general(t, b, (((1,), (1,)), ((), ())))


def block_scales(w: NF4Tensor) -> tuple[Array, Array]:
    """Of a weight of whole blocks in each row: the blocks' scales over their row's [N, K / block]; the rows' [N]."""
    blocks = jnp.asarray(decode_scales(w)).reshape(w.shape[0], -1)
    rows = row_scales(jnp.max(jnp.abs(blocks), axis=1))
    return blocks / rows[:, None], rows


def decode_xla(w: NF4Tensor, transposed: bool) -> tuple[Array, Array]:
    """e4m3 [N, K], or [K, N], and the scales of the N rows."""
    n, k = w.shape
    codes = unpacked(w.codes).reshape(-1)[: n * k].reshape(n, k)
    if k % w.block_size:
        of_blocks = jnp.repeat(jnp.asarray(decode_scales(w)), w.block_size)[: n * k].reshape(n, k)
        rows = row_scales(jnp.max(jnp.abs(of_blocks), axis=1))
        factors = of_blocks / rows[:, None]
    else:
        of_blocks, rows = block_scales(w)
        factors = jnp.repeat(of_blocks, w.block_size, axis=1)
    values = (jnp.asarray(NF4_TABLE).at[codes].get(mode="promise_in_bounds") * factors).astype(E4M3)
    return (values.T if transposed else values), rows
