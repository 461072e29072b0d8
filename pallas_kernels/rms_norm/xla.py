"""RMSNorm through XLA, with a backward pass of its own.

Why it exists: differentiating the definition keeps four arrays of x's size for the backward pass; this keeps x and one
number a row. Numerics: forward as the reference, backward in float32 throughout, rounded once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.rms_norm.reference import rms_norm_reference

Residuals = tuple[Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm_xla(x: Array, scale: Array, eps: float, unit_offset: bool) -> Array:
    """See `pallas_kernels.rms_norm.api.rms_norm`."""
    return rms_norm_reference(x, scale, eps, unit_offset)


def _fwd(x: Array, scale: Array, eps: float, unit_offset: bool) -> tuple[Array, Residuals]:
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return rms_norm_reference(x, scale, eps, unit_offset), (x, scale, lax.rsqrt(mean_square + eps))


def _bwd(eps: float, unit_offset: bool, residuals: Residuals, dy: Array) -> tuple[Array, Array]:
    x, scale, inverse_rms = residuals
    normalised, dy_f32 = x.astype(jnp.float32) * inverse_rms, dy.astype(jnp.float32)
    factor = scale.astype(jnp.float32)
    d_normalised = dy_f32 * (1.0 + factor if unit_offset else factor)
    along = jnp.mean(d_normalised * normalised, axis=-1, keepdims=True)
    dx = inverse_rms * (d_normalised - normalised * along)
    d_scale = jnp.sum(dy_f32 * normalised, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm_xla.defvjp(_fwd, _bwd)
