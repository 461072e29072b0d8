"""Causal attention by tiles that never leave the multiprocessor, as Pallas kernels through Triton.

Why it exists: packed rows, soft-caps and windows in O(T) memory, where cuDNN has no soft-cap and takes a matrix for the
documents. Tiles of keys that no query of a tile sees, being of other documents or beyond the window, are not visited,
and of those that every query sees whole nothing is masked
(FlashAttention-2, arXiv:2307.08691; gradients of keys sum over the heads they serve, so results repeat bit for bit).
Numerics: scores, soft-cap and softmax in float32; weights and their gradients are rounded to q's dtype for the
products. Heads whose width is no power of two from 16 on are filled up with zeros in registers. Refuses wider ones than
256.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, masked_span, row_kernel_reason, triton_call
from pallas_kernels.attention.tiles import Span, Tiles, filled, seen_tiles, spans_of, tiling
from pallas_kernels.attention.xla import Form

_LOG2E = math.log2(math.e)
# Below every score, and finite: a tile that a query sees nothing of must not make NaN. A power of two, so that its
# product with a factor is exact: fused with the subtraction of the largest score it must come to zero, and no more.
_MASKED = -(2.0**100)


def unsupported_reason(q: Array) -> str | None:
    """Why q cannot be served here, or None."""
    if q.shape[-1] > 256:
        return f"it takes head widths up to 256, not {q.shape[-1]}"
    return row_kernel_reason(q)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_triton(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> Array:
    """See `pallas_kernels.attention.api.attention`; q, k and v are of one length."""
    return _forward(q, k, v, segment_ids, form)[0]


def _fwd(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> tuple[Array, tuple[Any, ...]]:
    out, log_sums = _forward(q, k, v, segment_ids, form)
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "attention_sums")
    return out, (q, k, v, segment_ids, out, log_sums)


def backward(form: Form, residuals: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    """Gradients of q, k and v, from q, k, v, segment_ids, the result, and log2 of each query's sum [B, N, T]."""
    q, k, v, segment_ids, out, log_sums = residuals
    shared = (q, k, v, d_out, log_sums, along_queries(d_out, out))
    return _d_queries(*shared, segment_ids, form), *_d_keys(*shared, segment_ids, form), None


def along_queries(d_out: Array, out: Array) -> Array:
    """What each query's gradients of scores are lessened by, [B, N, T]."""
    return jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32)


attention_triton.defvjp(_fwd, backward)


class _Reader:
    """Tiles of arrays [B, T, N, H], and of what belongs to their rows, for one program."""

    def __init__(self, batch: Array, length: int, segments_ref: Any) -> None:
        self.batch, self.length, self.segments_ref = batch, length, segments_ref

    def inside(self, first: Array, size: int) -> Array | None:
        """Which rows of a tile exist; None if all do."""
        return None if self.length % size == 0 else first + lax.iota(jnp.int32, size) < self.length

    def span(self, ref: Any, tile: Array) -> Span:
        """What `spans_of` says of a tile."""
        return Span(*(ref[self.batch, tile, i] for i in range(4)))

    def rows(self, ref: Any, first: Array, size: int, head: Array, *, whole: bool = False) -> Array:
        """[size, filled H] of one head; zeros where there are no rows, which a `whole` tile has no room for."""
        mask = self.mask(ref, first, size, whole=whole)
        return plt.load(self.at(ref, first, size, head), mask=mask, other=None if mask is None else 0.0)

    def store(self, ref: Any, first: Array, head: Array, values: Array) -> None:
        """Writes [size, filled H] of one head."""
        size = values.shape[0]
        mask = self.mask(ref, first, size, whole=False)
        plt.store(self.at(ref, first, size, head), values.astype(ref.dtype), mask=mask)

    def mask(self, ref: Any, first: Array, size: int, *, whole: bool) -> Array | None:
        """Which elements of [size, filled H] exist; None if all do."""
        shape, inside = (size, filled(ref.shape[3])), None if whole else self.inside(first, size)
        rows = None if inside is None else jnp.broadcast_to(inside[:, None], shape)
        if shape[1] == ref.shape[3]:
            return rows
        columns = lax.broadcasted_iota(jnp.int32, shape, 1) < ref.shape[3]
        return columns if rows is None else rows & columns

    def at(self, ref: Any, first: Array, size: int, head: Array) -> Any:
        """A reference to [size, filled H] of one head."""
        return ref.at[self.batch, pl.ds(first, size), head, masked_span(0, filled(ref.shape[3]), first)]

    def numbers(self, ref: Any, first: Array, size: int, head: Array, *, whole: bool = False) -> Array:
        """[size] of an array [B, N, T]."""
        inside = None if whole else self.inside(first, size)
        return plt.load(
            ref.at[self.batch, head, pl.ds(first, size)], mask=inside, other=None if inside is None else 0.0
        )

    def segments(self, first: Array, size: int) -> Array:
        """Documents of a tile's rows."""
        inside = self.inside(first, size)
        other = None if inside is None else 0
        return plt.load(self.segments_ref.at[self.batch, pl.ds(first, size)], mask=inside, other=other)

    def visible(self, query: Array, key: Array, tiles: Tiles, form: Form, *, keys_first: bool) -> Array:
        """Which scores of a tile count, [queries, keys] or, with `keys_first`, [keys, queries]."""
        q_axis, k_axis = (1, 0) if keys_first else (0, 1)
        shape = (tiles.keys, tiles.queries) if keys_first else (tiles.queries, tiles.keys)
        q_index = query + lax.broadcasted_iota(jnp.int32, shape, q_axis)
        k_index = key + lax.broadcasted_iota(jnp.int32, shape, k_axis)
        seen = k_index <= q_index
        if form.window is not None:
            seen &= k_index > q_index - form.window
        if self.segments_ref is not None:
            documents = self.segments(query, tiles.queries), self.segments(key, tiles.keys)
            seen &= jnp.expand_dims(documents[0], k_axis) == jnp.expand_dims(documents[1], q_axis)
        return seen


def _scores(a: Array, b: Array, seen: Array | None, form: Form) -> tuple[Array, float]:
    """a b^T as scores, masked but for None, and the factor that makes their unit log 2; it is positive, so that the
    largest score may be looked for before it is multiplied."""
    scores, factor = _dot(a, b, trans_b=True), form.scale * _LOG2E
    if form.cap is not None:
        # tanh by way of exp2: the hardware's own is off by 2^-11, which the cap multiplies.
        power = jnp.exp2(scores * (2 * factor / form.cap))
        scores, factor = 1 - 2 / (1 + power), form.cap * _LOG2E
    elif not factor > 0:
        scores, factor = scores * factor, 1.0
    return scores if seen is None else jnp.where(seen, scores, _MASKED), factor


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, precision=precision, **transposed)


def _d_scores(weights: Array, d_weights: Array, along: Array, scores: Array, form: Form) -> Array:
    """Gradient of the products a b^T, but for the scale."""
    d_scores = weights * (d_weights - along)
    if form.cap is not None:
        # Where a score is masked its weight is zero, and any finite slope will do.
        capped = jnp.maximum(scores, -1.0)
        d_scores *= 1 - capped * capped
    return d_scores


def _forward(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> tuple[Array, Array]:
    """The result, and log2 of each query's sum, float32 [B, N, T]."""
    (b, t, n, _), group, width = q.shape, q.shape[2] // k.shape[2], filled(q.shape[3])
    tiles = tiling("forward", q)
    spans = spans_of(seen_tiles(segment_ids, q.shape, form, tiles), axis=2)

    def kernel(spans_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *rest: Any) -> None:
        (out_ref, sums_ref), batch, head = rest[-2:], pl.program_id(2), pl.program_id(1)
        reader = _Reader(batch, t, rest[0] if segment_ids is not None else None)
        # The last queries have the most to do, and begin first.
        tile = spans.shape[1] - 1 - pl.program_id(0)
        query, span = tile * tiles.queries, reader.span(spans_ref, tile)
        queries = reader.rows(q_ref, query, tiles.queries, head)

        def add(tile: Array, carry: tuple[Array, ...], whole: bool) -> tuple[Array, ...]:
            highest, total, sums = carry
            key = tile * tiles.keys
            keys = reader.rows(k_ref, key, tiles.keys, head // group, whole=whole)
            seen = None if whole else reader.visible(query, key, tiles, form, keys_first=False)
            scores, factor = _scores(queries, keys, seen, form)
            risen = jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
            shrink, weights = jnp.exp2(highest - risen), jnp.exp2(scores * factor - risen[:, None])
            values = reader.rows(v_ref, key, tiles.keys, head // group, whole=whole)
            sums = sums * shrink[:, None] + _dot(weights.astype(values.dtype), values)
            return risen, total * shrink + jnp.sum(weights, axis=1), sums

        start = jnp.full((tiles.queries,), _MASKED, jnp.float32), jnp.zeros((tiles.queries,), jnp.float32)
        highest, total, sums = _over(span, add, (*start, jnp.zeros((tiles.queries, width), jnp.float32)))
        reader.store(out_ref, query, head, sums / total[:, None])
        at = sums_ref.at[batch, head, pl.ds(query, tiles.queries)]
        plt.store(at, highest + jnp.log(total) * _LOG2E, mask=reader.inside(query, tiles.queries))

    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)]
    grid = (spans.shape[1], n, b)
    out, sums = _call("attention", kernel, shapes, grid, tiles, spans, q, k, v, segment_ids)
    return out, sums


def _d_queries(
    q: Array, k: Array, v: Array, d_out: Array, log_sums: Array, along: Array, segment_ids: Array | None, form: Form
) -> Array:
    (b, t, n, _), group, width = q.shape, q.shape[2] // k.shape[2], filled(q.shape[3])
    tiles = tiling("queries", q)
    spans = spans_of(seen_tiles(segment_ids, q.shape, form, tiles), axis=2)

    def kernel(
        spans_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, sums_ref: Any, along_ref: Any, *rest: Any
    ) -> None:
        batch, head = pl.program_id(2), pl.program_id(1)
        reader = _Reader(batch, t, rest[0] if segment_ids is not None else None)
        tile = spans.shape[1] - 1 - pl.program_id(0)
        query, span = tile * tiles.queries, reader.span(spans_ref, tile)
        queries, d_rows = (reader.rows(ref, query, tiles.queries, head) for ref in (q_ref, do_ref))
        row_sums, row_along = (reader.numbers(ref, query, tiles.queries, head) for ref in (sums_ref, along_ref))

        def add(tile: Array, dq: Array, whole: bool) -> Array:
            key = tile * tiles.keys
            keys, values = (reader.rows(ref, key, tiles.keys, head // group, whole=whole) for ref in (k_ref, v_ref))
            seen = None if whole else reader.visible(query, key, tiles, form, keys_first=False)
            scores, factor = _scores(queries, keys, seen, form)
            weights = jnp.exp2(scores * factor - row_sums[:, None])
            d_weights = _dot(d_rows, values, trans_b=True)
            d_scores = _d_scores(weights, d_weights, row_along[:, None], scores, form)
            return dq + _dot(d_scores.astype(keys.dtype), keys)

        dq = _over(span, add, jnp.zeros((tiles.queries, width), jnp.float32))
        reader.store(rest[-1], query, head, dq * form.scale)

    operands = (spans, q, k, v, d_out, log_sums, along, segment_ids)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    (dq,) = _call("attention_d_queries", kernel, shapes, (spans.shape[1], n, b), tiles, *operands)
    return dq


def _d_keys(
    q: Array, k: Array, v: Array, d_out: Array, log_sums: Array, along: Array, segment_ids: Array | None, form: Form
) -> tuple[Array, Array]:
    (b, t, *_), kv_heads, width = q.shape, k.shape[2], filled(q.shape[3])
    group = q.shape[2] // kv_heads
    tiles = tiling("keys", q)
    spans = spans_of(seen_tiles(segment_ids, q.shape, form, tiles), axis=1)

    def kernel(
        spans_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, sums_ref: Any, along_ref: Any, *rest: Any
    ) -> None:
        tile, kv_head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        reader = _Reader(batch, t, rest[0] if segment_ids is not None else None)
        key, span = tile * tiles.keys, reader.span(spans_ref, tile)
        keys, values = (reader.rows(ref, key, tiles.keys, kv_head) for ref in (k_ref, v_ref))

        def add(tile: Array, sums: tuple[Array, Array], whole: bool, head: Array) -> tuple[Array, Array]:
            query = tile * tiles.queries
            queries, d_rows = (reader.rows(ref, query, tiles.queries, head, whole=whole) for ref in (q_ref, do_ref))
            row_sums, row_along = (
                reader.numbers(ref, query, tiles.queries, head, whole=whole) for ref in (sums_ref, along_ref)
            )
            seen = None if whole else reader.visible(query, key, tiles, form, keys_first=True)
            if seen is not None and (inside := reader.inside(query, tiles.queries)) is not None:
                seen &= inside[None, :]
            scores, factor = _scores(keys, queries, seen, form)
            weights = jnp.exp2(scores * factor - row_sums[None, :])
            d_weights = _dot(values, d_rows, trans_b=True)
            d_scores = _d_scores(weights, d_weights, row_along[None, :], scores, form)
            dk = sums[0] + _dot(d_scores.astype(queries.dtype), queries)
            return dk, sums[1] + _dot(weights.astype(d_rows.dtype), d_rows)

        zeros = jnp.zeros((tiles.keys, width), jnp.float32)
        dk, dv = _over(span, add, (zeros, zeros), first_head=kv_head * group, heads=group)
        reader.store(rest[-2], key, kv_head, dk * form.scale)
        reader.store(rest[-1], key, kv_head, dv)

    operands = (spans, q, k, v, d_out, log_sums, along, segment_ids)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    dk, dv = _call("attention_d_keys", kernel, shapes, (spans.shape[1], kv_heads, b), tiles, *operands)
    return dk, dv


def _over(span: Span, add: Callable[..., Any], start: Any, *, first_head: Any = 0, heads: int | None = None) -> Any:
    """The fold of add(tile, carry, whole) over a span's tiles; with `heads`, of add(tile, carry, whole, head) over the
    tiles of each of these heads, in one loop."""
    masked, whole = span.masked(), span.whole_end - span.whole_first

    def folded(carry: Any, count: Array, tile_of: Callable[[Array], Array], is_whole: bool) -> Any:
        if heads is None:
            return lax.fori_loop(0, count, lambda step, carry: add(tile_of(step), carry, is_whole), carry)

        def step_of_heads(step: Array, carry: Any) -> Any:
            return add(tile_of(step % count), carry, is_whole, first_head + step // count)

        return lax.fori_loop(0, heads * count, step_of_heads, carry)

    carry = folded(start, masked, span.masked_tile, False)
    return folded(carry, whole, lambda step: span.whole_first + step, True)


def _call(
    name: str,
    kernel: Callable[..., None],
    shapes: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    tiles: Tiles,
    *operands: Array | None,
) -> list[Array]:
    given = [x for x in operands if x is not None]
    return triton_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        in_specs=[WHOLE] * len(given),
        out_specs=[WHOLE] * len(shapes),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        name=name,
    )(*given)
