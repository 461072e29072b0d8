"""Causal attention by its definition: all scores at once, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


def visible(
    q_index: Int[Array, T],
    kv_index: Int[Array, S],
    q_segments: Int[Array, "B T"] | None,
    kv_segments: Int[Array, "B S"] | None,
    window: int | None = None,
) -> Bool[Array, "#B T S"]:
    """Which keys each query sees: those at or before it, of its own document, and the last `window` of them only."""
    mask_1xTxS = (kv_index[None, :] <= q_index[:, None])[None]
    if window is not None:
        mask_1xTxS &= (kv_index[None, :] > q_index[:, None] - window)[None]
    if q_segments is None or kv_segments is None:
        return mask_1xTxS
    return mask_1xTxS & (q_segments[:, :, None] == kv_segments[:, None, :])


def attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T, over the keys that `mask` shows) v; each key head serves N / K query heads.

    cap: soft-cap of the scores, cap * tanh(score / cap), or None.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    q_BxTxKxGxH = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(b, t, n, h)
