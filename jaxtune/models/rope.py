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

_KNOWN = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How the queries and keys of a layer are turned.

    inverse_frequencies: radians per position, one for each pair of a head's elements that is turned; where these are
        fewer than H / 2, the rest of the head stays as it is.
    attention_factor: on all cosines and sines (yarn, longrope).
    context: the tokens that inverse_frequencies are for. Documents that are longer have others, by one of:
    long_inverse_frequencies: these instead (longrope).
    dynamic_factor: the base grows with the document's length, by this factor (dynamic).
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    context: int = 0
    long_inverse_frequencies: tuple[float, ...] | None = None
    dynamic_factor: float | None = None

    @property
    def width(self) -> int:
        """Elements of a head that are turned."""
        return 2 * len(self.inverse_frequencies)

    def cos_sin(
        self, positions: Int[Array, "B T"], lengths: Int[Array, "B _"]
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Cosines and sines of each token's angles, float32.

        Args:
            positions: of each token in its document.
            lengths: tokens of the document that each token is of.
        """
        frequencies = jnp.asarray(np.asarray(self.inverse_frequencies, np.float32))
        length_BxTx1 = lengths[..., None]
        if self.long_inverse_frequencies is not None:
            long = np.asarray(self.long_inverse_frequencies, np.float32)
            frequencies = jnp.where(length_BxTx1 > self.context, long, frequencies)
        if self.dynamic_factor is not None:
            longer = jnp.maximum(length_BxTx1, self.context).astype(jnp.float32) / self.context
            stretch = self.dynamic_factor * longer - (self.dynamic_factor - 1)
            frequencies *= stretch ** (-np.arange(0, self.width, 2, dtype=np.float32) / max(self.width - 2, 1))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return self.attention_factor * jnp.cos(angles), self.attention_factor * jnp.sin(angles)


def document_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B _"]:
    """Tokens of the document that each token is of: one past its last position.

    segment_ids: a number from 0 to T per document of a packed row; None where every row is one document.
    """
    if segment_ids is None:
        return jnp.max(positions, axis=1, keepdims=True) + 1
    rows = jnp.arange(positions.shape[0])[:, None]
    longest = jnp.zeros((positions.shape[0], positions.shape[1] + 1), positions.dtype)
    return longest.at[rows, segment_ids].max(positions + 1)[rows, segment_ids]


def rope_from_hf(
    config: Mapping[str, Any], head_dim: int, max_position: int, layer_type: str = "full_attention"
) -> RopeConfig:
    """The rotation of one type of layer, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    Raises:
        UserError: the scaling is of a type that is not implemented, or lacks one of its values.
    """
    parameters = _parameters(config, layer_type)
    theta = np.float32(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    width = int(head_dim * partial)
    # Frequencies in float32 throughout, as transformers computes them.
    frequencies = np.float32(1.0) / np.power(theta, np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("su", "yarn") and "short_factor" in parameters:
        kind = "longrope"
    original = parameters.get("original_max_position_embeddings") or max_position
    try:
        if kind == "default":
            return RopeConfig(_floats(frequencies))
        if kind == "linear":
            return RopeConfig(_floats(frequencies / np.float32(parameters["factor"])))
        if kind == "dynamic":
            return RopeConfig(_floats(frequencies), context=max_position, dynamic_factor=float(parameters["factor"]))
        if kind == "llama3":
            return RopeConfig(_floats(_llama3(frequencies, parameters, original)))
        if kind == "yarn":
            return _yarn(frequencies, parameters, float(theta), original)
        if kind == "longrope":
            return _longrope(frequencies, parameters, original, max_position)
        if kind == "freq_factors":
            return RopeConfig(_floats(frequencies / np.asarray(parameters["factors"], np.float32)))
    except KeyError as missing:
        raise UserError(f"config.json: rope scaling {kind!r} lacks {missing}; complete the file") from None
    raise UserError(
        f"config.json: rope scaling {kind!r} is not implemented; known are {', '.join(_KNOWN)}. Use a model without "
        "it, or remove the scaling to train within the model's original context"
    )


def _parameters(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """The scaling and base that the config gives one type of layer, whichever way it states them."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(given.get(layer_type), Mapping):
        return dict(given[layer_type])
    if layer_type == "sliding_attention" and config.get("rope_local_base_freq"):
        return {"rope_theta": config["rope_local_base_freq"]}
    # Phi-3 states it beside the scaling.
    beside = {"original_max_position_embeddings": config.get("original_max_position_embeddings")}
    return dict(given) | {key: value for key, value in beside.items() if value is not None}


def _floats(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(frequencies.astype(np.float32).tolist())


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any], original: int) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, blended)
    return np.where(wavelengths < original / high, frequencies, scaled)


def _yarn(frequencies: np.ndarray, parameters: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    """YaRN (arXiv:2309.00071): pairs that turn often in the original context are kept, slow ones divided by `factor`,
    a linear ramp over the pairs between."""
    factor, width = parameters["factor"], 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (
        pair_that_turns(parameters.get(name) or default) for name, default in (("beta_fast", 32), ("beta_slow", 1))
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    scaled = frequencies / np.float32(factor) * ramp + frequencies * (1 - ramp)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        scales = (parameters.get("mscale"), parameters.get("mscale_all_dim"))
        attention_factor = (
            _mscale(factor, 1) if not all(scales) else _mscale(factor, scales[0]) / _mscale(factor, scales[1])
        )
    return RopeConfig(_floats(scaled), attention_factor=float(attention_factor))


def _mscale(factor: float, scale: float | None) -> float:
    assert scale is not None
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(frequencies: np.ndarray, parameters: Mapping[str, Any], original: int, max_position: int) -> RopeConfig:
    """LongRoPE (arXiv:2402.13753): a divisor for each pair, one list for short and one for long documents."""
    short, long = (np.asarray(parameters[name], np.float32) for name in ("short_factor", "long_factor"))
    if not len(short) == len(long) == len(frequencies):
        raise UserError(
            f"config.json: rope scaling 'longrope' has {len(short)} short and {len(long)} long factors for "
            f"{len(frequencies)} pairs of a head; take the model's own file"
        )
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        factor = parameters.get("factor") or max_position / original
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        _floats(frequencies / short),
        attention_factor=float(attention_factor),
        context=original,
        long_inverse_frequencies=_floats(frequencies / long),
    )
