"""RMSNorm by its definition (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def rms_norm_reference(
    x: Float[Array, "*M D"], scale: Float[Array, D], eps: float, unit_offset: bool = False
) -> Float[Array, "*M D"]:
    """x / sqrt(mean(x^2) + eps) * scale: statistics in float32, rounded to x.dtype before the scale, as Llama does.

    With unit_offset the factor is 1 + scale, in float32, and the product alone is rounded, as Gemma does.
    """
    x_f32 = x.astype(jnp.float32)
    inverse_rms = lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return scaled(x_f32 * inverse_rms, scale, x.dtype, unit_offset)


def scaled(normalised: Array, scale: Array, dtype: Any, unit_offset: bool) -> Array:
    """Normalised rows (float32) times their factor, with the roundings of `rms_norm_reference`."""
    if unit_offset:
        return (normalised * (1.0 + scale.astype(jnp.float32))).astype(dtype)
    return normalised.astype(dtype) * scale.astype(dtype)
