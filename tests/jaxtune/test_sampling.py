"""Choosing tokens: settings, filters by their definitions, draws. transformers' own filters: tests/parity."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.sampling import Sampling, next_tokens, process

LOGITS = np.log(np.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.3, 0.3, 0.3, 0.05]], np.float32))


def kept(**settings: Any) -> list[list[int]]:
    """Tokens of each row that the filters leave."""
    out = process(jnp.asarray(LOGITS), Sampling(temperature=1.0, **settings).values(), None)
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(out)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 1}, [[0], [1, 2, 3]]),  # tokens as likely as the last one stay
        ({"top_k": 3}, [[0, 1, 2], [1, 2, 3]]),
        ({"top_k": 99}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ({"top_p": 0.45}, [[0], [1, 2, 3]]),
        ({"top_p": 0.6}, [[0, 1], [1, 2, 3]]),
        ({"top_p": 1.0}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ({"min_p": 0.25}, [[0, 1, 2], [1, 2, 3]]),
        ({"min_p": 0.0}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        # Of the two most likely tokens, 5/7 and 2/7 once the rest is gone, the first reaches 0.7 alone.
        ({"top_k": 2, "top_p": 0.7}, [[0], [1, 2, 3]]),
    ],
)
def test_filters(settings: dict[str, Any], expected: list[list[int]]) -> None:
    assert kept(**settings) == expected


def test_penalty_and_temperature() -> None:
    logits = jnp.array([[2.0, -1.0, 0.5]])
    seen = jnp.array([[True, True, False]])
    out = process(logits, Sampling(temperature=0.5, repetition_penalty=2.0).values(), seen)
    np.testing.assert_allclose(out, [[2.0, -4.0, 1.0]])
    greedy = process(logits, Sampling(repetition_penalty=5.0, top_k=1).values(), seen)
    np.testing.assert_allclose(greedy, [[0.4, -5.0, 0.5]])


def test_greedy_takes_the_first_of_equals() -> None:
    tokens = next_tokens(jnp.asarray(LOGITS), Sampling().values(), None, jax.random.key(0))
    assert tokens.tolist() == [0, 1]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    """The counts of 4,000 draws lie within four standard deviations of the filtered distribution."""
    settings = Sampling(temperature=1.0, top_k=3).values()
    logits = jnp.asarray(LOGITS[:1])
    draw = jax.jit(jax.vmap(lambda i: next_tokens(logits, settings, None, jax.random.fold_in(jax.random.key(7), i))))
    drawn = np.asarray(draw(jnp.arange(4000)))[:, 0]
    expected = np.array([0.5, 0.2, 0.15, 0, 0]) / 0.85
    counts = np.bincount(drawn, minlength=5)
    assert (np.abs(counts - 4000 * expected) <= 4 * np.sqrt(4000 * expected * (1 - expected))).all()
    np.testing.assert_array_equal(drawn, np.asarray(draw(jnp.arange(4000)))[:, 0])


def test_rows_draw_by_themselves() -> None:
    """What a row draws does not depend on how many rows there are, and equal rows differ."""
    settings = Sampling(temperature=1.0).values()
    logits = jnp.zeros((6, 1000))
    key = jax.random.key(3)
    six = next_tokens(logits, settings, None, key)
    np.testing.assert_array_equal(six[:2], next_tokens(logits[:2], settings, None, key))
    assert len(set(six.tolist())) > 1


def test_values_are_arguments_of_the_program() -> None:
    """Only which settings are on is compiled in."""
    one, other = Sampling(0.7, top_p=0.9, seed=1), Sampling(1.3, top_p=0.5, seed=2)
    assert jax.tree.structure(one.values()) == jax.tree.structure(other.values())
    assert Sampling(top_p=0.9, top_k=5).values() == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": None},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"{name} is .*; it must be"):
        Sampling(**settings)
