"""Attention of new tokens to a cache that holds them, through Triton.

Why it exists: XLA makes half a dozen launches of it, which read the whole cache however few tokens it holds, and of a
chunk of a prompt it holds all scores. Here a program takes a tile of queries, all that share a head of the cache, and
goes through the keys that they see (FlashAttention, arXiv:2205.14135). One new token has too few tiles to fill a GPU:
its keys are cut into parts, with a program each, and the parts' softmax is put together at the end. The cache is read
in the stack of all layers. Numerics: scores, soft-cap, softmax and sums in float32; weights are rounded to the cache's
dtype for their product, before they are divided by their sum. Refuses float32, and head widths that are no power of two
from 16 to 256.
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

# Keys of a tile; queries of one, and those that a product takes at least; programs that fill a GPU, and parts at most.
_TILE, _ROWS, _LEAST_ROWS, _PROGRAMS, _MOST_PARTS = 64, 64, 16, 256, 16
_WIDTHS = (16, 32, 64, 128, 256)
_LOWEST = float(jnp.finfo(jnp.float32).min)


def unsupported_reason(q: Array, cache: Array | StackLayer) -> str | None:
    """Why q [B, T, N, H] cannot be served here, or None."""
    if q.shape[3] not in _WIDTHS:
        return f"heads of {q.shape[3]} elements are none of {_WIDTHS}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or cache.dtype != q.dtype:
        return f"it multiplies numbers of 16 bits, and q is {q.dtype}, the cache {cache.dtype}"
    return gpu_reason()


def cached_attention_triton(
    q: Array, keys: Array | StackLayer, values: Array | StackLayer, start: Array | int, first: Array | None, form: Form
) -> Array:
    """See `pallas_kernels.attention.api.cached_attention`."""
    b, length, n, h = q.shape
    k, v = as_stack_layer(keys), as_stack_layer(values)
    capacity, kv_heads = k.shape[1:3]
    group = n // kv_heads
    # Rows of a tile: some tokens, of each the queries that share a head of the cache, filled up to a power of two.
    per_token = max(_LEAST_ROWS if length == 1 else 1, pl.next_power_of_2(group))
    rows = per_token if length == 1 else max(_ROWS, per_token)
    tokens = rows // per_token
    parts = max(1, min(_MOST_PARTS, _PROGRAMS // (b * kv_heads), pl.cdiv(capacity, _TILE))) if length == 1 else 1
    if first is None:
        first = jnp.zeros(b, jnp.int32)

    def across(size: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, (size, h), 1)

    def kernel(*refs: Any) -> None:
        start_ref, first_ref, k_index_ref, v_index_ref, q_ref, k_ref, v_ref, out_ref, *sums_refs = refs
        row, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        token = (part if length > 1 else 0) * tokens + lax.iota(jnp.int32, rows) // per_token
        heads = head * group + lax.iota(jnp.int32, rows) % per_token
        at_query = start_ref[0] + token
        end = start_ref[0] + 1 if length == 1 else start_ref[0] + jnp.minimum((part + 1) * tokens, length)
        begin = first_ref[row]
        if form.window is not None:
            begin = jnp.maximum(begin, start_ref[0] + (part * tokens if length > 1 else 0) + 1 - form.window)
        count = pl.cdiv(end - begin, _TILE)
        each = pl.cdiv(count, parts)
        # Queries beyond the group's and the last token are read within the array, and not written; keys beyond the
        # cache are not seen.
        own = (row, jnp.minimum(token, length - 1)[:, None], jnp.minimum(heads, n - 1)[:, None], across(rows))
        query = plt.load(q_ref.at[own])

        def tile(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, highest, total = carry
            at = begin + number * _TILE + lax.iota(jnp.int32, _TILE)
            place = (row, jnp.minimum(at, end - 1)[:, None], head, across(_TILE))
            some = plt.load(k_ref.at[(k_index_ref[0], *place)])
            scores = plt.dot(query, some, trans_b=True) * form.scale
            if form.cap is not None:
                # tanh by way of exp: the hardware's own is off by 2^-11, which the cap multiplies.
                scores = form.cap * (1 - 2 / (1 + jnp.exp(scores * (2 / form.cap))))
            seen = (at < end)[None] if length == 1 else at[None] <= at_query[:, None]
            if length > 1 and form.window is not None:
                seen &= at[None] > at_query[:, None] - form.window
            scores = jnp.where(seen, scores, _LOWEST)
            now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, rest = jnp.exp(scores - now[:, None]), jnp.exp(highest - now)
            some = plt.load(v_ref.at[(v_index_ref[0], *place)])
            product = plt.dot(weights.astype(some.dtype), some)
            return out * rest[:, None] + product, now, total * rest + jnp.sum(weights, axis=1)

        nothing = jnp.zeros((rows, h), jnp.float32), jnp.full(rows, _LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32)
        from_, to = (part * each, jnp.minimum((part + 1) * each, count)) if length == 1 else (0, count)
        out, highest, total = lax.fori_loop(from_, to, tile, nothing)
        mine = (lax.iota(jnp.int32, rows) % per_token < group) & (token < length)
        everywhere = jnp.broadcast_to(mine[:, None], (rows, h))
        if parts == 1:
            out = out / _divisor(total)[:, None]
        place = (row, part if length == 1 else token[:, None], heads[:, None], across(rows))
        plt.store(out_ref.at[place], out.astype(out_ref.dtype), mask=everywhere)
        if parts > 1:
            for ref, some in zip(sums_refs, (highest, total), strict=True):
                plt.store(ref.at[row, part, heads], some, mask=mine)

    operands = [jnp.reshape(start, (1,)), first, jnp.reshape(k.index, (1,)), jnp.reshape(v.index, (1,))]
    operands += [q, k.stack, v.stack]
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if parts > 1:
        shapes = [jax.ShapeDtypeStruct((b, parts, n, *more), jnp.float32) for more in ((h,), (), ())]
    result = triton_call(
        kernel,
        out_shape=shapes,
        grid=(b, kv_heads, parts if length == 1 else pl.cdiv(length, tokens)),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * len(shapes),
        num_warps=4,
        num_stages=2,
        name="cached_attention",
    )(*operands)
    return result[0] if parts == 1 else _joined(*result).astype(q.dtype)[:, None]


def _joined(out: Array, highest: Array, total: Array) -> Array:
    """float32 [B, N, H] of parts [B, P, N, H] that saw some keys each, their largest scores, and their sums."""
    weights = jnp.exp(highest - jnp.max(highest, axis=1, keepdims=True))
    return jnp.sum(out * weights[..., None], axis=1) / _divisor(jnp.sum(total * weights, axis=1))[..., None]


def _divisor(total: Array) -> Array:
    # Padding that is a query sees nothing.
    return jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
