"""RMSNorm through XLA, with a backward pass of its own.

Why it exists: differentiating the definition keeps four arrays of x's size for the backward pass; this keeps x and one
number a row. Numerics: forward as the reference, backward in float32 throughout, rounded once.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.rms_norm.reference import scaled


def rms_norm_forward_xla(
    x: Array, scale: Array, residual: Array | None, eps: float, unit_offset: bool, tail: int
) -> tuple[Array, Array, Array]:
    """See `pallas_kernels.rms_norm.api.rms_norm_forward`."""
    total = x if residual is None else x + residual.astype(x.dtype)
    value = total.astype(jnp.float32)
    inverse_rms = lax.rsqrt(jnp.mean(jnp.square(value), axis=-1) + eps)
    y = scaled(value * inverse_rms[:, None], scale, x.dtype, unit_offset)
    return jnp.pad(y, ((0, 0), (0, tail))) if tail else y, inverse_rms, total


def rms_norm_backward_xla(
    total: Array,
    scale: Array,
    inverse_rms: Array,
    dy: Array,
    extra: Array | None,
    d_total: Array | None,
    unit_offset: bool,
) -> Array:
    """See `pallas_kernels.rms_norm.api.rms_norm_backward`."""
    gradient = dy[:, : total.shape[1]].astype(jnp.float32)
    if extra is not None:
        gradient += extra.astype(jnp.float32)
    factor = scale.astype(jnp.float32)
    gradient *= 1.0 + factor if unit_offset else factor
    normalised = total.astype(jnp.float32) * inverse_rms[:, None]
    along = jnp.mean(gradient * normalised, axis=1, keepdims=True)
    dx = inverse_rms[:, None] * (gradient - normalised * along)
    return (dx if d_total is None else dx + d_total.astype(jnp.float32)).astype(total.dtype)
