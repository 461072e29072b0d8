"""Llama's logits against transformers on the files that it saved itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import pytest

from pallas_kernels.nf4 import NF4Tensor

TOLERANCE = 1e-5

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
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
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": LINEAR},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


def use_old_style(directory: Path, rope_theta: float, rope_scaling: dict[str, Any] | None) -> None:
    """Rewrite config.json with the keys of transformers 4."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": rope_theta, "rope_scaling": rope_scaling, "torch_dtype": config.pop("dtype")}
    path.write_text(json.dumps(config))


def logits_error(directory: Path) -> float:
    """Ours against theirs on 2 rows of 150 tokens."""
    ours, theirs = peers.load_ours(directory), peers.load_theirs(directory)
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, 150)
    return peers.relative_error(peers.our_logits(ours, tokens), peers.their_logits(theirs, tokens))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    peers.save_random_llama(tmp_path, **changes)
    assert logits_error(tmp_path) < TOLERANCE


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [
        (300000.0, None),
        (10000.0, {"type": "linear", "factor": 2.5}),
        (10000.0, {key: value for key, value in LLAMA3.items() if key != "rope_theta"}),
    ],
    ids=["theta", "linear", "llama3"],
)
def test_logits_from_an_old_config(tmp_path: Path, theta: float, scaling: dict[str, Any] | None) -> None:
    peers.save_random_llama(tmp_path)
    plain = peers.load_ours(tmp_path)
    use_old_style(tmp_path, theta, scaling)
    assert logits_error(tmp_path) < TOLERANCE
    assert peers.load_ours(tmp_path).decoder.rope != plain.decoder.rope


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
