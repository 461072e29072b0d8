"""Attention of one new token of each row to its cache, through Triton.

Why it exists: XLA makes half a dozen launches of it, which read the whole cache however few tokens it holds. Here the
keys that a query sees are cut into parts, with a program each for every part and head of the cache; the parts' softmax
is put together at the end (FlashAttention's way, arXiv:2205.14135, along the keys). The cache is read in the stack of
all layers. Numerics: scores, soft-cap, softmax and sums in float32; weights are rounded to the cache's dtype for their
product, before they are divided by their sum. Refuses several new tokens, float32, and head widths that are no power
of two from 16 to 256.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._stack import StackLayer, as_stack_layer
from pallas_kernels._triton import WHOLE, gpu_reason, triton_call
from pallas_kernels.attention.xla import Form

# Keys of a tile; queries that a product takes at least; programs that fill a GPU, and parts of one row at most.
_TILE, _LEAST_ROWS, _PROGRAMS, _MOST_PARTS = 64, 16, 256, 16
_WIDTHS = (16, 32, 64, 128, 256)
_LOWEST = float(jnp.finfo(jnp.float32).min)


def unsupported_reason(q: Array, cache: Array | StackLayer) -> str | None:
    """Why q [B, T, N, H] cannot be served here, or None."""
    if q.shape[1] != 1:
        return f"it serves one new token, not {q.shape[1]}"
    if q.shape[3] not in _WIDTHS:
        return f"heads of {q.shape[3]} elements are none of {_WIDTHS}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or cache.dtype != q.dtype:
        return f"it multiplies numbers of 16 bits, and q is {q.dtype}, the cache {cache.dtype}"
    return gpu_reason()


def cached_attention_triton(
    q: Array, keys: Array | StackLayer, values: Array | StackLayer, start: Array | int, first: Array | None, form: Form
) -> Array:
    """See `pallas_kernels.attention.api.cached_attention`; q is [B, 1, N, H]."""
    b, _, n, h = q.shape
    k, v = as_stack_layer(keys), as_stack_layer(values)
    capacity, kv_heads = k.shape[1:3]
    group, rows = n // kv_heads, max(_LEAST_ROWS, pl.next_power_of_2(n // kv_heads))
    parts = max(1, min(_MOST_PARTS, _PROGRAMS // (b * kv_heads), -(-capacity // _TILE)))
    if first is None:
        first = jnp.zeros(b, jnp.int32)

    def across(size: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, (size, h), 1)

    def kernel(*refs: Any) -> None:
        start_ref, first_ref, k_index_ref, v_index_ref, q_ref, k_ref, v_ref, out_ref, highest_ref, sum_ref = refs
        row, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        end, begin = start_ref[0] + 1, first_ref[row]
        if form.window is not None:
            begin = jnp.maximum(begin, end - form.window)
        each = pl.cdiv(pl.cdiv(end - begin, _TILE), parts)
        # Queries beyond the group's are read within the array, and not written; keys beyond the cache are not seen.
        heads = head * group + lax.iota(jnp.int32, rows)
        query = plt.load(q_ref.at[row, jnp.minimum(heads, n - 1)[:, None], across(rows)])

        def tile(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, highest, total = carry
            at = begin + number * _TILE + lax.iota(jnp.int32, _TILE)
            tokens = (row, jnp.minimum(at, end - 1)[:, None], head, across(_TILE))
            some = plt.load(k_ref.at[(k_index_ref[0], *tokens)])
            scores = plt.dot(query, some, trans_b=True) * form.scale
            if form.cap is not None:
                # tanh by way of exp: the hardware's own is off by 2^-11, which the cap multiplies.
                scores = form.cap * (1 - 2 / (1 + jnp.exp(scores * (2 / form.cap))))
            scores = jnp.where((at < end)[None], scores, _LOWEST)
            now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, rest = jnp.exp(scores - now[:, None]), jnp.exp(highest - now)
            some = plt.load(v_ref.at[(v_index_ref[0], *tokens)])
            product = plt.dot(weights.astype(some.dtype), some)
            return out * rest[:, None] + product, now, total * rest + jnp.sum(weights, axis=1)

        nothing = jnp.zeros((rows, h), jnp.float32), jnp.full(rows, _LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32)
        last = jnp.minimum((part + 1) * each, pl.cdiv(end - begin, _TILE))
        out, highest, total = lax.fori_loop(part * each, last, tile, nothing)
        mine = lax.iota(jnp.int32, rows) < group
        everywhere = jnp.broadcast_to(mine[:, None], (rows, h))
        plt.store(out_ref.at[row, part, heads[:, None], across(rows)], out, mask=everywhere)
        plt.store(highest_ref.at[row, part, heads], highest, mask=mine)
        plt.store(sum_ref.at[row, part, heads], total, mask=mine)

    operands = [jnp.reshape(start, (1,)), first, jnp.reshape(k.index, (1,)), jnp.reshape(v.index, (1,))]
    operands += [q[:, 0], k.stack, v.stack]
    shapes = [(b, parts, n, h), (b, parts, n), (b, parts, n)]
    out, highest, total = triton_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(b, kv_heads, parts),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * 3,
        num_warps=4,
        num_stages=2,
        name="cached_attention",
    )(*operands)
    # Padding that is a query sees nothing.
    weights = jnp.exp(highest - jnp.max(highest, axis=1, keepdims=True))
    total = jnp.maximum(jnp.sum(total * weights, axis=1), jnp.finfo(jnp.float32).tiny)
    out = jnp.sum(out * weights[..., None], axis=1) / total[..., None]
    return out.astype(q.dtype)[:, None]
