"""Rotary frequencies and their scalings, as transformers defines them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxtune.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Inverse frequencies, one per pair of a head's elements (H / 2 of them), in radians per position."""

    inverse_frequencies: tuple[float, ...]

    def cos_sin(self, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Cosines and sines of each token's angles, float32."""
        angles = positions[..., None].astype(jnp.float32) * np.asarray(self.inverse_frequencies, np.float32)
        return jnp.cos(angles), jnp.sin(angles)


def rope_from_hf(config: Mapping[str, Any], head_dim: int, max_position: int) -> RopeConfig:
    """Frequencies from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (earlier).

    Raises:
        UserError: the scaling is of a type that is not implemented, or lacks one of its values.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    # Frequencies in float32 throughout, as transformers computes them.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(theta), exponents)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    try:
        if kind == "linear":
            frequencies = frequencies / np.float32(parameters["factor"])
        elif kind == "llama3":
            frequencies = _llama3(frequencies, parameters, max_position)
        elif kind == "freq_factors":
            frequencies = frequencies / np.asarray(parameters["factors"], np.float32)
        elif kind != "default":
            raise UserError(
                f"config.json: rope scaling {kind!r} is not implemented; known are default, linear and llama3. "
                "Use a model without it, or remove the scaling to train within the model's original context"
            )
    except KeyError as missing:
        raise UserError(f"config.json: rope scaling {kind!r} lacks {missing}; complete the file") from None
    return RopeConfig(tuple(frequencies.tolist()))


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any], max_position: int) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters.get("original_max_position_embeddings") or max_position
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, blended)
    return np.where(wavelengths < original / high, frequencies, scaled).astype(np.float32)
