"""Causal attention through XLA, a slice of queries at a time.

Why it exists: it runs everywhere and takes every mask, with memory for one slice's scores. The forward pass keeps each
row's log-sum-exp; the backward pass makes a slice's weights again from it (FlashAttention's way, arXiv:2205.14135, by
slices instead of tiles). A loop visits the slices, since XLA may reorder unrolled ones and hold
the scores of all; the price is that the masked half of the products is computed too.
Numerics: scores, their soft-cap and softmax in float32; weights and their gradients are rounded to q's dtype for the
products.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.reference import visible

SLICE = 512


class Form(NamedTuple):
    """What is fixed about one call; see `pallas_kernels.attention.api.attention`."""

    scale: float
    window: int | None = None
    cap: float | None = None


Residuals = tuple[Array, Array, Array, Array | None, Array]


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contract one axis of [B, K, ., .] with one of [B, K, ., .], accumulating in float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _slices(x: Array, axis: int) -> Array:
    """Cut `axis` into slices, the last filled up with zeros, and bring their number to the front."""
    length = x.shape[axis]
    size = min(SLICE, length)
    count = -(-length // size)
    x = jnp.pad(x, [(0, count * size - length if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _joined(x: Array, axis: int, length: int) -> Array:
    """The inverse of `_slices`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _grouped(x: Array, kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    b, t, n, h = x.shape
    return x.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: Array) -> Array:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    b, k, g, t, h = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)


def _scores(q: Array, k: Array, form: Form, start: Array, q_segments: Array | None, segments: Array | None) -> Array:
    """Masked scores [B, K, G, T', S] of one slice's queries [B, K, G, T', H], which begins at index `start`."""
    b, kv_heads, g, t, h = q.shape
    s = _dot(q.reshape(b, kv_heads, g * t, h), k, 3, 3).reshape(b, kv_heads, g, t, -1) * form.scale
    if form.cap is not None:
        s = form.cap * jnp.tanh(s / form.cap)
    mask = visible(start + jnp.arange(t), jnp.arange(k.shape[2]), q_segments, segments, form.window)
    return jnp.where(mask[:, None, None], s, jnp.finfo(jnp.float32).min)


def _starts(slices: Array) -> Array:
    """Index of each slice's first query."""
    return jnp.arange(slices.shape[0]) * slices.shape[4]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_xla(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> Array:
    """See `pallas_kernels.attention.api.attention`; q, k and v are of one length."""
    return _fwd(q, k, v, segment_ids, form)[0]


def _fwd(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> tuple[Array, Residuals]:
    k_BxKxSxH, v_BxKxSxH = k.swapaxes(1, 2), v.swapaxes(1, 2)
    queries = _slices(_grouped(q, k.shape[2]), 3)

    def one_slice(inputs: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        start, q_slice, q_segments = inputs
        s = _scores(q_slice, k_BxKxSxH, form, start, q_segments, segment_ids)
        highest = jnp.max(s, axis=-1, keepdims=True)
        weights = jnp.exp(s - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        b, kv_heads, g, t, length = s.shape
        out = _dot(weights.astype(v.dtype).reshape(b, kv_heads, g * t, length), v_BxKxSxH, 3, 2)
        return (out.reshape(q_slice.shape) / total).astype(q.dtype), highest + jnp.log(total)

    segments = None if segment_ids is None else _slices(segment_ids, 1)
    outs, log_sums = lax.map(one_slice, (_starts(queries), queries, segments))
    out, log_sums = (
        checkpoint_name(_ungrouped(_joined(outs, 3, q.shape[1])), "attention"),
        checkpoint_name(log_sums, "attention_sums"),
    )
    return out, (q, k, v, segment_ids, log_sums)


def _bwd(form: Form, residuals: Residuals, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, log_sums = residuals
    k_BxKxSxH, v_BxKxSxH = k.swapaxes(1, 2), v.swapaxes(1, 2)
    queries, d_outs = (_slices(_grouped(x, k.shape[2]), 3) for x in (q, d_out))

    def one_slice(sums: tuple[Array, Array], inputs: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        start, q_slice, do_slice, log_sum, q_segments = inputs
        b, kv_heads, g, t, h = q_slice.shape
        s = _scores(q_slice, k_BxKxSxH, form, start, q_segments, segment_ids)
        weights = jnp.exp(s - log_sum)
        q_rows, do_rows = (x.reshape(b, kv_heads, g * t, h) for x in (q_slice, do_slice))
        d_weights = _dot(do_rows, v_BxKxSxH, 3, 3).reshape(weights.shape)
        along = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_s = form.scale * weights * (d_weights - along)
        if form.cap is not None:
            # Where a score is masked its weight is zero, and any finite slope will do.
            d_s *= 1 - jnp.square(jnp.clip(s / form.cap, -1.0, 1.0))
        d_scores = d_s.astype(q.dtype).reshape(b, kv_heads, g * t, -1)
        # The narrow operand first, as XLA transposes the first one: the sums are [B, K, H, S].
        dk = sums[0] + _dot(q_rows, d_scores, 2, 2)
        dv = sums[1] + _dot(do_rows, weights.astype(q.dtype).reshape(d_scores.shape), 2, 2)
        dq = _dot(d_scores, k_BxKxSxH, 3, 2).reshape(q_slice.shape).astype(q.dtype)
        return (dk, dv), dq

    segments = None if segment_ids is None else _slices(segment_ids, 1)
    zeros = jnp.zeros(k_BxKxSxH.swapaxes(2, 3).shape, jnp.float32)
    inputs = (_starts(queries), queries, d_outs, log_sums, segments)
    (dk, dv), dqs = lax.scan(one_slice, (zeros, zeros), inputs)
    dq = _ungrouped(_joined(dqs, 3, q.shape[1]))
    return dq, dk.transpose(0, 3, 1, 2).astype(k.dtype), dv.transpose(0, 3, 1, 2).astype(v.dtype), None


attention_xla.defvjp(_fwd, _bwd)
