"""Hugging Face configuration of a Llama model, from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = ("llama",)


class Metadata(dict[str, Any]):
    """The metadata of one file, by key; looking up a missing key raises an error that says what to do."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"{self.path}: metadata key {key!r} is missing; convert the model again with llama.cpp's "
            "convert_hf_to_gguf.py"
        )

    def decimal(self, key: str) -> float:
        """The shortest decimal that rounds to the stored float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self[key])))

    def uniform(self, key: str) -> int:
        """A number that GGUF may also give once per layer."""
        value = np.unique(self[key])
        if len(value) != 1:
            raise NotImplementedError(f"{self.path}: {key!r} differs between layers ({value}); one value is supported")
        return int(value[0])


def check_architecture(metadata: Metadata) -> None:
    """Raise unless the file holds a whole, dense model of a supported architecture.

    Raises:
        ValueError: `general.architecture` is missing or unsupported.
        NotImplementedError: A mixture of experts, or one part of a split file.
    """
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{metadata.path}: general.architecture is {architecture!r}; supported: {', '.join(ARCHITECTURES)}. "
            "Load the model's safetensors instead"
        )
    if metadata.get("llama.expert_count", 0):
        raise NotImplementedError(f"{metadata.path}: mixtures of experts (llama.expert_count > 0) are not supported")
    if metadata.get("split.count", 1) > 1:
        raise NotImplementedError(
            f"{metadata.path}: one part of a split model; join the parts with llama-gguf-split --merge"
        )


def llama_config(
    metadata: Metadata,
    *,
    vocab_size: int,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """Return what `config.json` of the same model would hold.

    Args:
        metadata: Of a file that passed `check_architecture`.
        vocab_size: Rows of the embedding, which may be more than the tokenizer has tokens.
        tied: The file has no output matrix: the embedding serves as one.
        attention_bias: Whether q, k, v and o have biases.
        mlp_bias: Whether gate, up and down have biases.
        rope_factors: The tensor `rope_freqs.weight` [head_dim / 2], if any: divisors of the rotary frequencies.

    Returns:
        A dict for `transformers.LlamaConfig(**dict)`, with `rope_theta` and `rope_scaling` as in transformers 4.
        `rope_scaling` is None, "linear", "llama3" or, for factors that no Llama 3 recipe gives,
        {"rope_type": "freq_factors", "factors": [head_dim / 2 floats]}: ours, unknown to transformers.

    Raises:
        ValueError: A key is missing.
        NotImplementedError: Another rope scaling, a partial rotary embedding, or layers of different sizes.
    """
    heads = metadata.uniform("llama.attention.head_count")
    hidden_size = metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length", hidden_size // heads)
    if (rotary := metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise NotImplementedError(
            f"{metadata.path}: rotary embedding over {rotary} of {head_dim} dimensions; only all of them is supported"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.uniform("llama.feed_forward_length"),
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads(metadata),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _rope_theta(metadata),
        "rope_scaling": _rope_scaling(metadata, rope_factors, head_dim),
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def kv_heads(metadata: Metadata) -> int:
    """Number of key and value heads: as many as query heads unless said otherwise."""
    key = "llama.attention.head_count_kv"
    return metadata.uniform(key if metadata.get(key) is not None else "llama.attention.head_count")


def _rope_theta(metadata: Metadata) -> float:
    return metadata.decimal("llama.rope.freq_base") if metadata.get("llama.rope.freq_base") is not None else 10000.0


def _rope_scaling(metadata: Metadata, factors: np.ndarray | None, head_dim: int) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise NotImplementedError(
            f"{metadata.path}: rope scaling {kind!r} is not supported (none, linear, rope_freqs.weight are)"
        )
    # The second key is that of files from before October 2023.
    keys = [key for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear") if metadata.get(key)]
    factor = metadata.decimal(keys[0]) if kind == "linear" and keys else 1.0
    if factors is None:
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if factor != 1.0:
        raise NotImplementedError(
            f"{metadata.path}: rope_freqs.weight together with a linear rope scaling is not supported"
        )
    recipe = {
        "rope_type": "llama3",
        "factor": float(factors[-1]),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # The factors were made in float32 from a recipe of which every Llama 3 differs in `factor` alone.
    if np.allclose(factors, _llama3_factors(recipe, _rope_theta(metadata), head_dim), rtol=1e-5, atol=0):
        return recipe
    return {"rope_type": "freq_factors", "factors": [float(factor) for factor in factors]}


def _llama3_factors(recipe: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Divisors [head_dim / 2] of Llama 3.1: 1 for short waves, `factor` for long ones, harmonic means in between."""
    original = recipe["original_max_position_embeddings"]
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    low, high = recipe["low_freq_factor"], recipe["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / recipe["factor"] + smooth)
