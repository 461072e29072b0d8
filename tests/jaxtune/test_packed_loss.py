"""A row of any number of documents, as the data lay it out, has the loss and the gradients of each in a row alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from tiny import accumulated, decoder_config, frozen_tree, lora_tree

import jaxtune.models.attention
from jaxtune.config import LoraConfig
from jaxtune.data.documents import Document, Documents
from jaxtune.data.packing import lay_out
from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.step import StepConfig, accumulate
from pallas_kernels.attention import attention
from pallas_kernels.attention.reference import attention_reference, visible

LORA = LoraConfig(r=4, lora_alpha=8)
CAPACITY = 200
FULL = decoder_config()
WINDOWS = decoder_config(num_layers=4, windows=(5, None), attention_cap=20.0)


def by_definition(
    q: Array, k: Array, v: Array, *, segment_ids: Array, window: Any, cap: Any, scale: Any, deterministic: bool
) -> Array:
    assert not deterministic
    index = jnp.arange(q.shape[1])
    mask = visible(index, index, segment_ids, segment_ids, window)
    return attention_reference(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, cap)


def by_name(*arrays: Array, **form: Any) -> Array:
    return attention(*arrays, **form, implementation="xla")


def some_documents(count: int) -> Documents:
    """Lengths that all but fill a row between them, from one token on, and weights of all kinds."""
    rng = np.random.default_rng(count)
    cuts = np.sort(rng.choice(np.arange(1, CAPACITY - 4), count - 1, replace=False)) if count > 1 else []
    made = []
    for length in np.diff([0, *cuts, CAPACITY - 3]):
        weights = rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)
        weights[-1], weights[0] = 1.0, 0.0
        made.append(Document(rng.integers(1, 101, length).astype(np.int32), weights))
    return Documents(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "implementation"),
    [(FULL, by_name), (FULL, by_definition), (WINDOWS, by_name)],
    ids=["xla", "definition", "xla with windows"],
)
def test_packed_is_unpacked(decoder: DecoderConfig, implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtune.models.attention, "attention", implementation)
    step = StepConfig(decoder, Adaptation(2.0), jnp.float32, remat="none")
    lora, frozen = lora_tree(decoder, LORA), frozen_tree(decoder)
    compiled = jax.jit(lambda lora, frozen, batch: accumulate(lora, frozen, batch, step, None, 1.0))
    for count in (1, 2, 7, 40):
        documents = some_documents(count)
        assert len(documents) == count
        packed = lay_out(documents, [list(range(count))], CAPACITY)
        assert packed["segment_ids"].max() == count
        loss, gradient = compiled(lora, frozen, accumulated(packed))

        # The mean over the learnt tokens of all: each document's own mean by the weight that it has of them.
        alone = [lay_out(documents, [[index]], CAPACITY) for index in range(count)]
        shares = np.array([row["loss_weights"].sum() for row in alone]) / packed["loss_weights"].sum()
        parts = [
            jax.tree.map(lambda leaf: share * leaf, compiled(lora, frozen, accumulated(row)))  # noqa: B023
            for share, row in zip(shares, alone)
            if share
        ]
        expected_loss, expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * np.abs(other).max())
