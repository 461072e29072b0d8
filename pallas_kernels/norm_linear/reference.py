"""Residual sum, norm and adapted layers by their definition."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.lora_linear import Projection
from pallas_kernels.lora_linear.reference import projection_reference
from pallas_kernels.rms_norm.reference import rms_norm_reference


def norm_linear_reference(
    x: Float[Array, "*M K"],
    scale: Float[Array, " K"],
    group: Sequence[Projection],
    residual: Float[Array, "*M K"] | None = None,
    *,
    eps: float = 1e-6,
    scaling: float = 1.0,
) -> tuple[Float[Array, "*M N"], Float[Array, "*M K"]]:
    """The group's layers, without dropout, side by side on the normalised x + residual; and that sum."""
    total = x if residual is None else x + residual
    h = rms_norm_reference(total, scale, eps)
    return jnp.concatenate([projection_reference(h, each, scaling) for each in group], axis=-1), total
