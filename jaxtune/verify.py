"""Whether two forms of a model are the same model: their logits on the same text, side by side."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import hidden_states, logits


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far logits are from a reference.

    difference: root mean square of the difference over that of the reference, both about each token's mean, since a
    shift of all logits changes nothing. largest: of the absolute differences. loss, reference_loss: mean negative log
    likelihood of the text. tokens: compared.
    """

    difference: float
    largest: float
    loss: float
    reference_loss: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.2%} (largest {self.largest:.3g}), loss {self.reference_loss:.4f} -> "
            f"{self.loss:.4f} on {self.tokens} tokens"
        )


def text_logits(
    frozen: Any, lora: Any, batch: dict[str, np.ndarray], decoder: DecoderConfig, adaptation: Adaptation, dtype: Any
) -> Float[np.ndarray, "B T V"]:
    """Logits of packed rows (tokens, positions, segment_ids: int32 [B, T]) on the host, in float32."""
    return np.asarray(_logits(frozen, lora, batch, decoder, adaptation, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("decoder", "adaptation", "dtype"))
def _logits(
    frozen: Any, lora: Any, batch: dict[str, Any], decoder: DecoderConfig, adaptation: Adaptation, dtype: Any
) -> jax.Array:
    places = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden, _ = hidden_states(frozen, lora, *places, decoder, adaptation, dtype=dtype)
    return logits(frozen, hidden, decoder)


def compare(
    reference: Float[np.ndarray, "B T V"], other: Float[np.ndarray, "B T V"], batch: dict[str, np.ndarray]
) -> Comparison:
    """Compare logits over every token that is no padding; losses over those that follow another of their document."""
    real = batch["segment_ids"] > 0
    expected, found = (_centred(one[real]) for one in (reference, other))
    change = found - expected
    follows = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & real[:, 1:]
    targets = batch["tokens"][:, 1:][follows]
    return Comparison(
        difference=float(np.sqrt(np.mean(np.square(change)) / np.mean(np.square(expected)))),
        largest=float(np.abs(change).max()),
        loss=_loss(other[:, :-1][follows], targets),
        reference_loss=_loss(reference[:, :-1][follows], targets),
        tokens=int(real.sum()),
    )


def _centred(values: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    return values - values.mean(-1, keepdims=True)


def _loss(values: Float[np.ndarray, "T V"], targets: Int[np.ndarray, " T"]) -> float:
    values = values - values.max(-1, keepdims=True)
    likelihood = np.take_along_axis(values, targets[:, None], -1)[:, 0] - np.log(np.exp(values).sum(-1))
    return float(-likelihood.mean()) if len(targets) else float("nan")
