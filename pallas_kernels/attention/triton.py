"""Causal attention by tiles that never leave the multiprocessor, as Pallas kernels through Triton.

Why it exists: packed rows, soft-caps and windows in O(T) memory, where cuDNN has no soft-cap and takes a matrix for the
documents. Tiles of keys that no query of a tile sees, being of other documents or beyond the window, are not visited
(FlashAttention-2, arXiv:2307.08691; gradients of keys sum over the heads they serve, so results repeat bit for bit).
Numerics: scores, soft-cap and softmax in float32; weights and their gradients are rounded to q's dtype for the
products. Refuses head widths that are no power of two from 16 to 256.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._device import compute_capability
from pallas_kernels._triton import WHOLE, row_kernel_reason, triton_call
from pallas_kernels.attention.xla import Form

_LOG2E = math.log2(math.e)
# Below every score, and finite: a tile that a query sees nothing of must not make NaN.
_MASKED = -1e30
# Bytes of shared memory that a program may have, by compute capability.
_SHARED_BYTES = {8.0: 163_000, 8.7: 163_000, 9.0: 227_000, 10.0: 227_000}
_LEAST_SHARED_BYTES = 99_000


class Tiles(NamedTuple):
    """Queries and keys that a program works on at a time, its warps, and tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# By pass, then by head width up to which they serve.
TILES = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(64, 32, 4, 2)},
    "keys": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 32, 4, 2)},
    "queries": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
}


def unsupported_reason(q: Array) -> str | None:
    """Why q cannot be served here, or None."""
    width = q.shape[-1]
    if width & (width - 1) or not 16 <= width <= 256:
        return f"it takes head widths that are powers of two from 16 to 256, not {width}"
    return row_kernel_reason(q)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_triton(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> Array:
    """See `pallas_kernels.attention.api.attention`; q, k and v are of one length."""
    return _forward(q, k, v, segment_ids, form)[0]


def _fwd(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> tuple[Array, tuple[Any, ...]]:
    out, log_sums = _forward(q, k, v, segment_ids, form)
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "attention_sums")
    return out, (q, k, v, segment_ids, out, log_sums)


def _bwd(form: Form, residuals: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, out, log_sums = residuals
    along = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32)
    shared = (q, k, v, d_out, log_sums, along)
    return _d_queries(*shared, segment_ids, form), *_d_keys(*shared, segment_ids, form), None


attention_triton.defvjp(_fwd, _bwd)


def _tiles(name: str, q: Array) -> Tiles:
    """The tiling of a pass, with fewer tiles in flight where the GPU holds no more."""
    width, item = q.shape[3], q.dtype.itemsize
    tiles = next(tiles for widest, tiles in TILES[name].items() if width <= widest)
    kept, moving = (tiles.keys, tiles.queries) if name == "keys" else (tiles.queries, tiles.keys)
    kept *= 1 if name == "forward" else 2
    limit = _SHARED_BYTES.get(compute_capability() or 0.0, _LEAST_SHARED_BYTES)
    fitting = (limit - kept * width * item) // (2 * moving * width * item)
    return tiles._replace(stages=max(1, min(tiles.stages, fitting)))


def _visited(segment_ids: Array | None, shape: tuple[int, ...], form: Form, tiles: Tiles) -> Array:
    """Which tiles of keys a tile of queries may see some of, bool [B, query tiles, key tiles]; the last tile that it
    sees is on the diagonal, always.

    Documents are told apart by the least and the largest number in a tile: exactly where numbers rise along a row, and
    with some tiles too many where they do not.
    """
    b, t = shape[:2]
    first_query, first_key = (np.arange(0, t, size) for size in (tiles.queries, tiles.keys))
    last_query, last_key = (
        np.minimum(x + s, t) - 1 for x, s in ((first_query, tiles.queries), (first_key, tiles.keys))
    )
    seen = first_key[None, :] <= last_query[:, None]
    if form.window is not None:
        seen &= last_key[None, :] > first_query[:, None] - form.window
    seen_1xQxS = jnp.asarray(seen)[None]
    if segment_ids is None:
        return jnp.broadcast_to(seen_1xQxS, (b, *seen.shape))

    def extremes(size: int) -> tuple[Array, Array]:
        padded = jnp.pad(segment_ids, ((0, 0), (0, -t % size)), mode="edge").reshape(b, -1, size)
        return jnp.min(padded, axis=2), jnp.max(padded, axis=2)

    (q_least, q_most), (k_least, k_most) = extremes(tiles.queries), extremes(tiles.keys)
    same = (k_least[:, None, :] <= q_most[:, :, None]) & (k_most[:, None, :] >= q_least[:, :, None])
    return seen_1xQxS & same


class _Reader:
    """Tiles of arrays [B, T, N, H], and of what belongs to their rows, for one program."""

    def __init__(self, batch: Array, length: int, segments_ref: Any) -> None:
        self.batch, self.length, self.segments_ref = batch, length, segments_ref

    def inside(self, first: Array, size: int) -> Array | None:
        """Which rows of a tile exist; None if all do."""
        return None if self.length % size == 0 else first + lax.iota(jnp.int32, size) < self.length

    def rows(self, ref: Any, first: Array, size: int, head: Array) -> Array:
        """[size, H] of one head; zeros where there are no rows."""
        inside = self.inside(first, size)
        mask = None if inside is None else jnp.broadcast_to(inside[:, None], (size, ref.shape[3]))
        return plt.load(self.at(ref, first, size, head), mask=mask, other=None if mask is None else 0.0)

    def store(self, ref: Any, first: Array, head: Array, values: Array) -> None:
        """Writes [size, H] of one head."""
        inside = self.inside(first, values.shape[0])
        mask = None if inside is None else jnp.broadcast_to(inside[:, None], values.shape)
        plt.store(self.at(ref, first, values.shape[0], head), values.astype(ref.dtype), mask=mask)

    def at(self, ref: Any, first: Array, size: int, head: Array) -> Any:
        """A reference to [size, H] of one head."""
        return ref.at[self.batch, pl.ds(first, size), head, :]

    def numbers(self, ref: Any, first: Array, size: int, head: Array) -> Array:
        """[size] of an array [B, N, T]."""
        inside = self.inside(first, size)
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


def _scores(a: Array, b: Array, seen: Array, form: Form) -> Array:
    """a b^T as scores in units of log 2, masked."""
    products = _dot(a, b, trans_b=True)
    if form.cap is None:
        scores = products * (form.scale * _LOG2E)
    else:
        # tanh by way of exp2: the hardware's own is off by 2^-11, which the cap multiplies.
        power = jnp.exp2(products * (2 * form.scale * _LOG2E / form.cap))
        scores = (form.cap * _LOG2E) * (1 - 2 / (1 + power))
    return jnp.where(seen, scores, _MASKED)


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, precision=precision, **transposed)


def _d_scores(weights: Array, d_weights: Array, along: Array, scores: Array, form: Form) -> Array:
    """Gradient of the products a b^T, but for the scale."""
    d_scores = weights * (d_weights - along)
    if form.cap is not None:
        # Where a score is masked its weight is zero, and any finite slope will do.
        capped = jnp.maximum(scores * (1 / (form.cap * _LOG2E)), -1.0)
        d_scores *= 1 - capped * capped
    return d_scores


def _forward(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> tuple[Array, Array]:
    """The result, and log2 of each query's sum, float32 [B, N, T]."""
    (b, t, n, width), group = q.shape, q.shape[2] // k.shape[2]
    tiles = _tiles("forward", q)
    first_tiles = jnp.argmax(_visited(segment_ids, q.shape, form, tiles), axis=2).astype(jnp.int32)

    def kernel(first_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *rest: Any) -> None:
        (out_ref, sums_ref), batch, head = rest[-2:], pl.program_id(2), pl.program_id(1)
        reader = _Reader(batch, t, rest[0] if segment_ids is not None else None)
        # The last queries have the most to do, and begin first.
        tile = first_tiles.shape[1] - 1 - pl.program_id(0)
        query = tile * tiles.queries
        queries = reader.rows(q_ref, query, tiles.queries, head)

        def add(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            highest, total, sums = carry
            key = step * tiles.keys
            keys = reader.rows(k_ref, key, tiles.keys, head // group)
            seen = reader.visible(query, key, tiles, form, keys_first=False)
            scores = _scores(queries, keys, seen, form)
            risen = jnp.maximum(highest, jnp.max(scores, axis=1))
            shrink, weights = jnp.exp2(highest - risen), jnp.exp2(scores - risen[:, None])
            values = reader.rows(v_ref, key, tiles.keys, head // group)
            sums = sums * shrink[:, None] + _dot(weights.astype(values.dtype), values)
            return risen, total * shrink + jnp.sum(weights, axis=1), sums

        start = jnp.full((tiles.queries,), _MASKED, jnp.float32), jnp.zeros((tiles.queries,), jnp.float32)
        last = (jnp.minimum(query + tiles.queries, t) - 1) // tiles.keys
        zeros = jnp.zeros((tiles.queries, width), jnp.float32)
        highest, total, sums = lax.fori_loop(first_ref[batch, tile], last + 1, add, (*start, zeros))
        reader.store(out_ref, query, head, sums / total[:, None])
        at = sums_ref.at[batch, head, pl.ds(query, tiles.queries)]
        plt.store(at, highest + jnp.log(total) * _LOG2E, mask=reader.inside(query, tiles.queries))

    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)]
    grid = (first_tiles.shape[1], n, b)
    out, sums = _call("attention", kernel, shapes, grid, tiles, first_tiles, q, k, v, segment_ids)
    return out, sums


def _d_queries(
    q: Array, k: Array, v: Array, d_out: Array, log_sums: Array, along: Array, segment_ids: Array | None, form: Form
) -> Array:
    (b, t, n, width), group = q.shape, q.shape[2] // k.shape[2]
    tiles = _tiles("queries", q)
    first_tiles = jnp.argmax(_visited(segment_ids, q.shape, form, tiles), axis=2).astype(jnp.int32)

    def kernel(
        first_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, sums_ref: Any, along_ref: Any, *rest: Any
    ) -> None:
        batch, head = pl.program_id(2), pl.program_id(1)
        reader = _Reader(batch, t, rest[0] if segment_ids is not None else None)
        tile = first_tiles.shape[1] - 1 - pl.program_id(0)
        query = tile * tiles.queries
        queries, d_rows = (reader.rows(ref, query, tiles.queries, head) for ref in (q_ref, do_ref))
        row_sums, row_along = (reader.numbers(ref, query, tiles.queries, head) for ref in (sums_ref, along_ref))

        def add(step: Array, dq: Array) -> Array:
            key = step * tiles.keys
            keys, values = (reader.rows(ref, key, tiles.keys, head // group) for ref in (k_ref, v_ref))
            seen = reader.visible(query, key, tiles, form, keys_first=False)
            scores = _scores(queries, keys, seen, form)
            weights = jnp.exp2(scores - row_sums[:, None])
            d_weights = _dot(d_rows, values, trans_b=True)
            d_scores = _d_scores(weights, d_weights, row_along[:, None], scores, form)
            return dq + _dot(d_scores.astype(keys.dtype), keys)

        last = (jnp.minimum(query + tiles.queries, t) - 1) // tiles.keys
        zeros = jnp.zeros((tiles.queries, width), jnp.float32)
        dq = lax.fori_loop(first_ref[batch, tile], last + 1, add, zeros)
        reader.store(rest[-1], query, head, dq * form.scale)

    operands = (first_tiles, q, k, v, d_out, log_sums, along, segment_ids)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    (dq,) = _call("attention_d_queries", kernel, shapes, (first_tiles.shape[1], n, b), tiles, *operands)
    return dq


def _d_keys(
    q: Array, k: Array, v: Array, d_out: Array, log_sums: Array, along: Array, segment_ids: Array | None, form: Form
) -> tuple[Array, Array]:
    (b, t, _, width), kv_heads = q.shape, k.shape[2]
    group = q.shape[2] // kv_heads
    tiles = _tiles("keys", q)
    visited = _visited(segment_ids, q.shape, form, tiles)
    ends = (visited.shape[1] - jnp.argmax(visited[:, ::-1], axis=1)).astype(jnp.int32)

    def kernel(
        end_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, sums_ref: Any, along_ref: Any, *rest: Any
    ) -> None:
        tile, kv_head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        reader = _Reader(batch, t, rest[0] if segment_ids is not None else None)
        key = tile * tiles.keys
        keys, values = (reader.rows(ref, key, tiles.keys, kv_head) for ref in (k_ref, v_ref))
        begin, end = key // tiles.queries, end_ref[batch, tile]

        def add(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            # One loop over all tiles of all heads that these keys serve.
            head, query = kv_head * group + step // (end - begin), (begin + step % (end - begin)) * tiles.queries
            queries, d_rows = (reader.rows(ref, query, tiles.queries, head) for ref in (q_ref, do_ref))
            row_sums, row_along = (reader.numbers(ref, query, tiles.queries, head) for ref in (sums_ref, along_ref))
            seen = reader.visible(query, key, tiles, form, keys_first=True)
            if (inside := reader.inside(query, tiles.queries)) is not None:
                seen &= inside[None, :]
            scores = _scores(keys, queries, seen, form)
            weights = jnp.exp2(scores - row_sums[None, :])
            d_weights = _dot(values, d_rows, trans_b=True)
            d_scores = _d_scores(weights, d_weights, row_along[None, :], scores, form)
            dk = sums[0] + _dot(d_scores.astype(queries.dtype), queries)
            return dk, sums[1] + _dot(weights.astype(d_rows.dtype), d_rows)

        zeros = jnp.zeros((tiles.keys, width), jnp.float32)
        dk, dv = lax.fori_loop(0, group * (end - begin), add, (zeros, zeros))
        reader.store(rest[-2], key, kv_head, dk * form.scale)
        reader.store(rest[-1], key, kv_head, dv)

    operands = (ends, q, k, v, d_out, log_sums, along, segment_ids)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    dk, dv = _call("attention_d_keys", kernel, shapes, (ends.shape[1], kv_heads, b), tiles, *operands)
    return dk, dv


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
