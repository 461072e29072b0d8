"""Attention of new tokens to a cache that holds them, through Triton.

Why it exists: XLA makes half a dozen launches of it, which read the whole cache however few tokens it holds, and of a
chunk of a prompt it holds all scores. Here a program takes a tile of queries, all that share a head of the cache, and
goes through the keys that they see (FlashAttention, arXiv:2205.14135). One new token has too few tiles to fill a GPU:
its keys are cut into parts, with a program each, and the parts' softmax is put together by what comes next. Its launch
may also take the token from where q, k and v were projected: every program rotates its own queries, the first part's
the key, which it writes into the cache with the value, and whose score it starts from. The cache is read in the stack
of all layers. Numerics: those of `split_rope`; scores, soft-cap, softmax and sums in float32; weights are rounded to
the cache's dtype for their product, before they are divided by their sum. Refuses float32, and head widths that are no
power of two from 16 to 256.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._stack import StackLayer, as_stack_layer
from pallas_kernels._triton import WHOLE, gpu_reason, load_f32, triton_call
from pallas_kernels.attention.parts import AttentionParts, divisor
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
) -> Array | AttentionParts:
    """See `pallas_kernels.attention.api.cached_attention`; of one token in parts."""
    out, _ = _attention(q, None, as_stack_layer(keys), as_stack_layer(values), start, first, form)
    return out


def attention_into_cache_triton(
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: StackLayer,
    values: StackLayer,
    start: Array | int,
    first: Array | None,
    form: Form,
) -> tuple[Array | AttentionParts, list[Array]]:
    """See `pallas_kernels.attention.api.attention_into_cache`; qkv is [B, 1, N + 2 K, H]."""
    return _attention(qkv, (cos[:, 0], sin[:, 0]), keys, values, start, first, form)


def _attention(
    q: Array,
    angles: tuple[Array, Array] | None,
    k: StackLayer,
    v: StackLayer,
    start: Array | int,
    first: Array | None,
    form: Form,
) -> tuple[Array | AttentionParts, list[Array]]:
    """q: [B, T, N, H]; or with angles, [B, half] each, [B, 1, N + 2 K, H] of a token that is not in the cache yet: then
    also the stacks with it."""
    b, length, n, h = q.shape
    capacity, kv_heads = k.shape[1:3]
    n -= 0 if angles is None else 2 * kv_heads
    group = n // kv_heads
    # Rows of a tile: some tokens, of each the queries that share a head of the cache, filled up to a power of two.
    per_token = max(_LEAST_ROWS if length == 1 else 1, pl.next_power_of_2(group))
    rows = per_token if length == 1 else max(_ROWS, per_token)
    tokens = rows // per_token
    parts = max(1, min(_MOST_PARTS, _PROGRAMS // (b * kv_heads), pl.cdiv(capacity, _TILE))) if length == 1 else 1
    first = jnp.zeros(b, jnp.int32) if first is None else first
    operands = [jnp.reshape(start, (1,)), first, jnp.reshape(k.index, (1,)), jnp.reshape(v.index, (1,)), q]
    operands += [*(angles or ()), k.stack, v.stack]

    def across(size: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, (size, h), 1)

    def scored(products: Array) -> Array:
        scores = products * form.scale
        # tanh by way of exp: the hardware's own is off by 2^-11, which the cap multiplies.
        return scores if form.cap is None else form.cap * (1 - 2 / (1 + jnp.exp(scores * (2 / form.cap))))

    def kernel(*refs: Any) -> None:
        start_ref, first_ref, k_index_ref, v_index_ref, q_ref, *angle_refs = refs[: len(operands) - 2]
        (k_ref, v_ref), (out_ref, *more_refs) = refs[len(operands) - 2 : len(operands)], refs[len(operands) :]
        row, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        layers = k_index_ref[0], v_index_ref[0]
        token = (part if length > 1 else 0) * tokens + lax.iota(jnp.int32, rows) // per_token
        heads = head * group + lax.iota(jnp.int32, rows) % per_token
        at_query = start_ref[0] + token
        # Keys from `begin` on and before `end` are seen by some query of the tile.
        end = start_ref[0] + (1 if length == 1 else jnp.minimum((part + 1) * tokens, length))
        begin = first_ref[row]
        if form.window is not None:
            begin = jnp.maximum(begin, start_ref[0] + (part * tokens if length > 1 else 0) + 1 - form.window)
        end -= 0 if angles is None else 1
        count = pl.cdiv(end - begin, _TILE)
        each = pl.cdiv(count, parts)

        def rotated(token: Any, head: Any, column: Array) -> Array:
            place = (row, token, head)
            if angles is None:
                return plt.load(q_ref.at[(*place, column)])
            half = angles[0].shape[1]
            turned, front = column < 2 * half, column < half
            partner = jnp.where(turned, jnp.where(front, column + half, column - half), column)
            angle = jnp.where(front, column, jnp.where(turned, column - half, 0))
            cosine, sine = (plt.load(ref.at[row, angle]) for ref in angle_refs)
            cosine, sine = jnp.where(turned, cosine, 1.0), jnp.where(turned, jnp.where(front, -sine, sine), 0.0)
            value = load_f32(q_ref.at[(*place, column)]) * cosine + load_f32(q_ref.at[(*place, partner)]) * sine
            return value.astype(q.dtype)

        # Queries beyond the group's and the last token are read within the array, and not written; keys beyond the
        # cache are not seen.
        query = rotated(jnp.minimum(token, length - 1)[:, None], jnp.minimum(heads, n - 1)[:, None], across(rows))

        def tile(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, highest, total = carry
            at = begin + number * _TILE + lax.iota(jnp.int32, _TILE)
            place = (row, jnp.minimum(at, end - 1)[:, None], head, across(_TILE))
            # Both under way before the first is used.
            key, value = (plt.load(ref.at[(layer, *place)]) for ref, layer in zip((k_ref, v_ref), layers, strict=True))
            scores = scored(plt.dot(query, key, trans_b=True))
            seen = (at < end)[None] if length == 1 else at[None] <= at_query[:, None]
            if length > 1 and form.window is not None:
                seen &= at[None] > at_query[:, None] - form.window
            scores = jnp.where(seen, scores, _LOWEST)
            now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, rest = jnp.exp(scores - now[:, None]), jnp.exp(highest - now)
            product = plt.dot(weights.astype(value.dtype), value)
            return out * rest[:, None] + product, now, total * rest + jnp.sum(weights, axis=1)

        out, highest, total = (
            jnp.zeros((rows, h), jnp.float32),
            jnp.full(rows, _LOWEST, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        if angles is not None:
            column = lax.iota(jnp.int32, h)
            key, value = rotated(0, n + head, column), plt.load(q_ref.at[row, 0, n + kv_heads + head, column])

            @pl.when(part == 0)
            def _() -> None:
                for ref, index, new in zip(more_refs[-2:], layers, (key, value), strict=True):
                    plt.store(ref.at[index, row, end, head, column], new.astype(ref.dtype))

            own = scored(jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32)[None], axis=1))
            start_of_first = jnp.broadcast_to(value.astype(jnp.float32)[None], (rows, h)), own, jnp.ones_like(total)
            is_first = part == 0
            out, highest, total = (
                jnp.where(is_first, a, b) for a, b in zip(start_of_first, (out, highest, total), strict=True)
            )
        from_, to = (part * each, jnp.minimum((part + 1) * each, count)) if length == 1 else (0, count)
        out, highest, total = lax.fori_loop(from_, to, tile, (out, highest, total))
        written = (lax.iota(jnp.int32, rows) % per_token < group) & (token < length)
        if parts == 1:
            out = out / divisor(total)[:, None]
        place = (row, part if length == 1 else token[:, None], heads[:, None], across(rows))
        plt.store(out_ref.at[place], out.astype(out_ref.dtype), mask=jnp.broadcast_to(written[:, None], (rows, h)))
        if parts > 1:
            for ref, some in zip(more_refs[:2], (highest, total), strict=True):
                plt.store(ref.at[row, part, heads], some, mask=written)

    shapes = [jax.ShapeDtypeStruct((b, length, n, h), q.dtype)]
    if parts > 1:
        shapes = [jax.ShapeDtypeStruct((b, parts, n, *more), jnp.float32) for more in ((h,), (), ())]
    results, aliases = len(shapes), {}
    if angles is not None:
        aliases = {len(operands) - 2 + i: results + i for i in range(2)}
        shapes += [jax.ShapeDtypeStruct(cache.stack.shape, cache.dtype) for cache in (k, v)]
    made = triton_call(
        kernel,
        out_shape=shapes,
        grid=(b, kv_heads, parts if length == 1 else pl.cdiv(length, tokens)),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * len(shapes),
        input_output_aliases=aliases,
        num_warps=4,
        num_stages=2,
        name="cached_attention",
    )(*operands)
    out = made[0] if parts == 1 else AttentionParts(made[0], made[1], made[2], q.dtype.name)
    return out, list(made[results:])
