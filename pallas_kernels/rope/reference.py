"""Rotary position embedding by its definition (arXiv:2104.09864), halves layout as in Hugging Face checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def rope_reference(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate the pair (x[i], x[i + half]) by its angle, in float32; the result has x's dtype.

    Where a head is wider than 2 half, its elements from there on stay as they are.
    """
    half = cos.shape[-1]
    first, second = jnp.split(x[..., : 2 * half].astype(jnp.float32), 2, axis=-1)
    cos_BxTx1xh, sin_BxTx1xh = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos_BxTx1xh - second * sin_BxTx1xh, second * cos_BxTx1xh + first * sin_BxTx1xh]
    return jnp.concatenate([*(r.astype(x.dtype) for r in rotated), x[..., 2 * half :]], axis=-1)
