"""The one norm of all families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array
from jaxtyping import Float

from jaxtune.models.config import DecoderConfig
from pallas_kernels.rms_norm import rms_norm


def norm(x: Float[Array, "*M D"], weights: Mapping[str, Any], config: DecoderConfig) -> Float[Array, "*M D"]:
    """RMSNorm with the weights {"scale": [D]}, in the family's form."""
    return rms_norm(x, weights["scale"], eps=config.norm_eps, unit_offset=config.unit_offset_norms)
