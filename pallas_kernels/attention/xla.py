"""Causal attention through XLA, a slice of queries at a time.

Why it exists: it runs everywhere and takes every mask. Slices are visited by a loop, and a slice's scores are computed
again in the backward pass instead of being kept, so memory is one slice's scores (unrolled slices would be held at
once: XLA may reorder them). The price is that the masked half of the products is computed too. Numerics: scores and
softmax in float32, weights rounded to q's dtype before the product with v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention.reference import attention_reference, visible

SLICE = 256


def _slices(x: Array, count: int) -> Array:
    """[B, T, ...] -> [count, B, SLICE, ...], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, count * SLICE - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], count, SLICE, *x.shape[2:]), 1, 0)


def attention_xla(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    """See `pallas_kernels.attention.api.attention`; q, k and v are of one length."""
    b, length, n, h = q.shape
    count = -(-length // SLICE)

    @jax.checkpoint
    def one_slice(inputs: tuple[Array, Array, Array | None]) -> Array:
        start, q_slice, q_segments = inputs
        mask = visible(start + jnp.arange(q_slice.shape[1]), jnp.arange(length), q_segments, segment_ids)
        return attention_reference(q_slice, k, v, mask, scale)

    if count == 1:
        return one_slice((jnp.int32(0), q, segment_ids))
    segments = None if segment_ids is None else _slices(segment_ids, count)
    out = lax.map(one_slice, (SLICE * jnp.arange(count), _slices(q, count), segments))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * SLICE, n, h)[:, :length]
