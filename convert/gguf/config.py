"""Hugging Face configuration of a model, from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# GGUF's architectures, and Hugging Face's names of them.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}


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

    @property
    def architecture(self) -> str:
        """GGUF's name of the family, which most keys begin with."""
        return str(self["general.architecture"])

    def of_model(self, key: str) -> str:
        """The full key of a property of the model."""
        return f"{self.architecture}.{key}"

    def decimal(self, key: str) -> float:
        """The shortest decimal that rounds to the stored float32: 1e-05, not 9.999999747378752e-06."""
        value = self[key]
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, "a number")
        return float(str(np.float32(value)))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above zero; `default` where the key is missing."""
        value = self[key] if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise self._wrong(key, "a whole number above zero")
        return value

    def _wrong(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.path}: {key} is {str(self[key])[:80]!r}, and must be {what}; convert the model again")

    def uniform(self, key: str) -> int:
        """A number that GGUF may also give once per layer."""
        value = np.unique(self[key])
        if value.dtype.kind not in "iu" or (len(value) and not 1 <= value.min() <= value.max() < 2**31):
            raise self._wrong(key, "whole numbers above zero")
        if len(value) != 1:
            raise NotImplementedError(f"{self.path}: {key!r} differs between layers ({value}); one value is supported")
        return int(value[0])


def check_architecture(metadata: Metadata) -> None:
    """Raise unless the file holds a whole, dense model of a supported architecture.

    Raises:
        ValueError: `general.architecture` is missing or unsupported.
        NotImplementedError: A mixture of experts, or one part of a split file.
    """
    architecture = metadata.architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{metadata.path}: general.architecture is {architecture!r}; supported: {', '.join(ARCHITECTURES)}. "
            "Load the model's safetensors instead"
        )
    if metadata.get(metadata.of_model("expert_count"), 0):
        raise NotImplementedError(
            f"{metadata.path}: mixtures of experts ({architecture}.expert_count > 0) are not supported"
        )
    if metadata.get("split.count", 1) > 1:
        raise NotImplementedError(
            f"{metadata.path}: one part of a split model; join the parts with llama-gguf-split --merge"
        )


def hf_config(
    metadata: Metadata, *, vocab_size: int, names: Collection[str], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return what `config.json` of the same model would hold.

    Args:
        metadata: Of a file that passed `check_architecture`.
        vocab_size: Rows of the embedding, which may be more than the tokenizer has tokens.
        names: Of the tensors, Hugging Face's.
        factors: The rotary factors [head_dim / 2], by `names.FACTORS`' words: divisors of the rotary frequencies.

    Returns:
        A dict for transformers' config class, with `rope_theta` and `rope_scaling` as in transformers 4.
        `rope_scaling` is None, "linear", "yarn", "longrope", "llama3" or, for factors that no Llama 3 recipe gives,
        {"rope_type": "freq_factors", "factors": [head_dim / 2 floats]}: ours, unknown to transformers.

    Raises:
        ValueError: A key is missing.
        NotImplementedError: Another rope scaling, a partial rotary embedding, or layers of different sizes.
    """
    key = metadata.of_model
    model_type, class_name = ARCHITECTURES[metadata.architecture]
    heads = metadata.uniform(key("attention.head_count"))
    hidden_size = metadata.whole(key("embedding_length"))
    head_dim = metadata.whole(key("attention.key_length"), hidden_size // heads)
    rotary = metadata.whole(key("rope.dimension_count"), head_dim)
    if rotary != head_dim and model_type != "phi3":
        raise NotImplementedError(
            f"{metadata.path}: rotary embedding over {rotary} of {head_dim} dimensions; only all of them is supported"
        )
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_act": "gelu_pytorch_tanh" if model_type.startswith("gemma") else "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.uniform(key("feed_forward_length")),
        "num_hidden_layers": metadata.whole(key("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads(metadata),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata.whole(key("context_length")),
        "rms_norm_eps": metadata.decimal(key("attention.layer_norm_rms_epsilon")),
        "rope_theta": _rope_theta(metadata),
        "rope_scaling": _rope_scaling(metadata, factors, head_dim),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return config | _of_family(metadata, config, rotary / head_dim)


def _of_family(metadata: Metadata, config: Mapping[str, Any], rotated: float) -> dict[str, Any]:
    """What only some families' configs have."""
    key, family = metadata.of_model, config["model_type"]
    window = metadata.get(key("attention.sliding_window")) or None
    if family == "phi3":
        original = metadata.get(key("rope.scaling.original_context_length"), config["max_position_embeddings"])
        return {
            "sliding_window": window,
            "partial_rotary_factor": rotated,
            "original_max_position_embeddings": original,
        }
    if family not in ("gemma2", "gemma3_text"):
        return {}
    # llama.cpp knows the 27B models, whose scores are scaled otherwise, by their number of layers.
    is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[family]
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    own: dict[str, Any] = {"sliding_window": window or 4096, "query_pre_attn_scalar": scalar}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        own[cap] = metadata.decimal(key(cap)) if metadata.get(key(cap)) else None
    if family == "gemma3_text":
        local = key("rope.freq_base_swa")
        own["rope_local_base_freq"] = metadata.decimal(local) if metadata.get(local) else 10000.0
    return own


def kv_heads(metadata: Metadata) -> int:
    """Number of key and value heads: as many as query heads unless said otherwise."""
    key = metadata.of_model("attention.head_count_kv")
    return metadata.uniform(key if metadata.get(key) is not None else metadata.of_model("attention.head_count"))


def _rope_theta(metadata: Metadata) -> float:
    key = metadata.of_model("rope.freq_base")
    return metadata.decimal(key) if metadata.get(key) is not None else 10000.0


def _rope_scaling(metadata: Metadata, by_word: Mapping[str, np.ndarray], head_dim: int) -> dict[str, Any] | None:
    key, factors = metadata.of_model, by_word.get("all")
    kind = metadata.get(key("rope.scaling.type"), "linear")
    if "short" in by_word and "long" in by_word:
        scaling: dict[str, Any] = {
            f"{word}_factor": [float(value) for value in by_word[word]] for word in ("short", "long")
        }
        attention = key("rope.scaling.attn_factor")
        if metadata.get(attention):
            scaling["attention_factor"] = metadata.decimal(attention)
        return {"rope_type": "longrope", **scaling}
    if kind not in ("none", "linear", "yarn"):
        raise NotImplementedError(
            f"{metadata.path}: rope scaling {kind!r} is not supported (none, linear, yarn, rope_freqs.weight are)"
        )
    # The second key is that of files from before October 2023.
    keys = [name for name in (key("rope.scaling.factor"), key("rope.scale_linear")) if metadata.get(name)]
    factor = metadata.decimal(keys[0]) if kind != "none" and keys else 1.0
    if kind == "yarn" and factors is None:
        return _yarn(metadata, factor)
    if factors is None:
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if factor != 1.0:
        raise NotImplementedError(
            f"{metadata.path}: rope_freqs.weight together with a {kind} rope scaling is not supported"
        )
    recipe = {
        "rope_type": "llama3",
        "factor": float(factors[-1]),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # The factors were made in float32 from a recipe of which every Llama 3 differs in `factor` alone.
    if np.allclose(factors, llama3_factors(recipe, _rope_theta(metadata), head_dim), rtol=1e-5, atol=0):
        return recipe
    return {"rope_type": "freq_factors", "factors": [float(factor) for factor in factors]}


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """What queries and keys are multiplied by where yarn's config has no factor for it (arXiv:2309.00071, 3.4)."""
    return 1.0 + 0.1 * scale * math.log(factor) if factor > 1.0 else 1.0


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    key = metadata.of_model
    for name, usual in (("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if metadata.get(key(f"rope.scaling.{name}"), usual) != usual:
            raise NotImplementedError(f"{metadata.path}: yarn with rope.scaling.{name} is not supported")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    scaling["original_max_position_embeddings"] = metadata[key("rope.scaling.original_context_length")]
    for name in ("beta_fast", "beta_slow"):
        if metadata.get(key(f"rope.scaling.yarn_{name}")):
            scaling[name] = metadata.decimal(key(f"rope.scaling.yarn_{name}"))
    if metadata.get(key("rope.scaling.attn_factor"), 1.0) != 1.0:
        scaling["attention_factor"] = metadata.decimal(key("rope.scaling.attn_factor")) * yarn_attention(factor)
    return scaling


def llama3_factors(recipe: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Divisors [head_dim / 2] of Llama 3.1: 1 for short waves, `factor` for long ones, harmonic means in between."""
    original = recipe["original_max_position_embeddings"]
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    low, high = recipe.get("low_freq_factor", 1.0), recipe.get("high_freq_factor", 4.0)
    with np.errstate(all="ignore"):
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return 1.0 / ((1.0 - smooth) / np.float64(recipe["factor"]) + smooth)
