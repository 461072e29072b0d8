"""Filters and penalty beside transformers' own, one by one and in its order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import generation

from jaxtune.sampling import Sampling, process


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 0.8, "top_p": 0.73},
        {"temperature": 1.2, "repetition_penalty": 1.3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
)
def test_processed_distribution(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    logits = (3 * rng.normal(size=(4, 203))).astype(np.float32)
    ids = rng.integers(0, 203, (4, 30))
    processors = {
        "repetition_penalty": generation.RepetitionPenaltyLogitsProcessor,
        "temperature": generation.TemperatureLogitsWarper,
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper,
    }
    theirs = torch.tensor(logits)
    for name, processor in processors.items():
        if name in settings:
            theirs = processor(settings[name])(torch.tensor(ids), theirs)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    ours = process(jnp.asarray(logits), Sampling(**settings).values(), jnp.asarray(seen))
    expected = torch.softmax(theirs, dim=-1).numpy()
    np.testing.assert_allclose(jax.nn.softmax(ours, axis=-1), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
