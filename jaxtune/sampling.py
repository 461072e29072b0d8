"""How the next token is chosen from the logits: the most likely one, or a draw from a filtered distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from jaxtune.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one generation, with the names and the meaning that they have in transformers.

    temperature: logits are divided by it; 0 takes the most likely token and ignores the filters. top_k: only the k most
    likely tokens. top_p: only the fewest tokens whose probabilities add up to p. min_p: only tokens at least min_p
    times as likely as the most likely one. repetition_penalty: logits of tokens in the prompt or in the answer are
    divided by it where positive and multiplied where negative; above 1 discourages repetition. seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "temperature": (lambda x: x == 0 or 1e-3 <= x <= 1e3, "0 (the most likely token), or from 0.001 to 1000"),
            "top_k": (lambda x: x >= 1 and x == int(x), "a whole number, 1 or more"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
            "repetition_penalty": (lambda x: 0 < x < math.inf, "above 0; 1 is no penalty"),
            "seed": (lambda x: 0 <= x < 2**32 and x == int(x), "a whole number from 0 to 2**32 - 1"),
        }
        for name, (test, rule) in rules.items():
            value = getattr(self, name)
            is_off = value is None and name in ("top_k", "top_p", "min_p")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_off and not (is_number and test(value)):
                raise UserError(f"{name} is {value!r}; it must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def values(self) -> dict[str, Array]:
        """What the compiled program needs: arrays of the settings that are on, so that only which of them are on, and
        not their values, is compiled in."""
        on = {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1 else {}
        if not self.is_greedy:
            filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
            on |= {"temperature": self.temperature} | {name: x for name, x in filters.items() if x is not None}
        return {name: jnp.asarray(x, jnp.int32 if name == "top_k" else jnp.float32) for name, x in on.items()}


def process(
    logits: Float[Array, "B V"], settings: dict[str, Array], seen: Bool[Array, "B V"] | None
) -> Float[Array, "B V"]:
    """Logits after penalty, temperature and filters, in this order; what a filter removes becomes minus infinity.

    Args:
        logits: float32. settings: `Sampling.values()`.
        seen: tokens of the prompt and of the answer so far; needed for the repetition penalty only.
    """
    if "repetition_penalty" in settings:
        assert seen is not None
        penalty = settings["repetition_penalty"]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if "temperature" in settings:
        logits = logits / settings["temperature"]
    if "top_k" in settings or "top_p" in settings:
        descending = jnp.sort(logits, axis=-1, descending=True)
        if "top_k" in settings:
            vocabulary = logits.shape[-1]
            rank = jnp.minimum(settings["top_k"], vocabulary) - 1
            least = descending[:, rank][:, None]
            logits, descending = (jnp.where(x >= least, x, -jnp.inf) for x in (logits, descending))
        if "top_p" in settings:
            probabilities = jax.nn.softmax(descending, axis=-1)
            # A token stays while those before it have not reached p: the one that reaches it is the last.
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            least = jnp.min(jnp.where(before < settings["top_p"], descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
    if "min_p" in settings:
        highest = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= highest + jnp.log(settings["min_p"]), logits, -jnp.inf)
    return logits


def next_tokens(
    logits: Float[Array, "B V"], settings: dict[str, Array], seen: Bool[Array, "B V"] | None, key: Key[Array, ""]
) -> Int[Array, " B"]:
    """The next token of each row, int32; row b draws with a key of its own, whatever the other rows are."""
    logits = process(logits, settings, seen)
    if "temperature" not in settings:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
