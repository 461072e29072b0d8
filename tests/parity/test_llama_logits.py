"""Llama's logits against transformers on the files that it saved itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest

from pallas_kernels.nf4 import NF4Tensor

TOLERANCE = 1e-5

LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.5}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one head of keys per query head": {"num_key_value_heads": 4},
    "one head of keys for all": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "heads as wide as the model": {"hidden_size": 56, "head_dim": None},
    "five odd heads": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 35, "head_dim": 6},
    "attention biases": {"attention_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "odd sizes": {
        "vocab_size": 251,
        "hidden_size": 39,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 53,
    },
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "exact gelu": {"hidden_act": "gelu"},
    "another epsilon": {"rms_norm_eps": 0.05, "num_hidden_layers": 1},
    "linear rope": {"rope_parameters": LINEAR},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """On 2 rows of 150 tokens."""
    peers.save_random_llama(tmp_path, **changes)
    ours, theirs = peers.load_ours(tmp_path), peers.load_theirs(tmp_path)
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, 150)
    assert peers.relative_error(peers.our_logits(ours, tokens), peers.their_logits(theirs, tokens)) < TOLERANCE


def test_logits_of_nf4(tmp_path: Path) -> None:
    """A checkpoint packed by bitsandbytes, which computes with the same bytes."""
    peers.save_random_llama(tmp_path / "dense", **peers.NF4_SIZES)
    theirs = peers.load_theirs(tmp_path / "dense", quantization_config=peers.nf4_settings())
    theirs.save_pretrained(tmp_path / "packed")
    ours = peers.load_ours(tmp_path / "packed", load_in_4bit=True)
    dense = peers.load_ours(tmp_path / "packed", load_in_4bit=False)
    assert isinstance(ours.frozen["layers"]["mlp"]["up_proj"]["kernel"], NF4Tensor)
    assert not isinstance(dense.frozen["layers"]["mlp"]["up_proj"]["kernel"], NF4Tensor)
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, 40)
    expected = peers.their_logits(theirs, tokens)
    assert peers.relative_error(peers.our_logits(ours, tokens), expected) < TOLERANCE
    assert peers.relative_error(peers.our_logits(dense, tokens), expected) < TOLERANCE
