"""A model's GGUF description, from its Hugging Face config: metadata, and the names and values of its tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, TensorNameMap, get_tensor_name_map

from convert.gguf.config import llama3_factors, yarn_attention

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp sees a family.

    arch: its architecture. interleaved: q and k rows of a head alternate between its halves. norm_offset: what is added
    to the norms' weights. window_every: layers per layer that sees everything, None where windows are not known there.
    """

    arch: MODEL_ARCH
    interleaved: bool = False
    norm_offset: float = 0.0
    window_every: int | None = None

    @property
    def name(self) -> str:
        """GGUF's `general.architecture`."""
        return self.arch.name.lower()


_ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma": Architecture(MODEL_ARCH.GEMMA, norm_offset=1.0),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_offset=1.0, window_every=2),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_offset=1.0, window_every=6),
    "phi3": Architecture(MODEL_ARCH.PHI3, window_every=1),
}


class Description:
    """One model in GGUF's terms.

    architecture: the family's. metadata: keys below the architecture's name, and their values.
    factors: rotary factors, tensors that no Hugging Face file has, by GGUF name.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Describe the model of a Hugging Face config.

        Raises:
            ValueError: a family that GGUF files are not written of.
            NotImplementedError: a property that llama.cpp's version of the family lacks.
        """
        model_type = config["model_type"]
        if model_type not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"model_type {model_type!r} cannot be written as GGUF; families that can: {known}")
        self.architecture = _ARCHITECTURES[model_type]
        self.layers = config["num_hidden_layers"]
        self._heads = config["num_attention_heads"]
        self._kv_heads = config.get("num_key_value_heads") or self._heads
        self._head_dim = config.get("head_dim") or config["hidden_size"] // self._heads
        self._names: TensorNameMap = get_tensor_name_map(self.architecture.arch, self.layers)
        _refuse_what_llama_cpp_lacks(config, self.architecture, self._head_dim)
        self.factors = _rotary_factors(config, self._head_dim)
        self.metadata = self._sizes(config) | _rope(config) | _windows(config, self.architecture)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self._kv_heads != self._heads

    def name(self, hf_name: str) -> str:
        """The GGUF name of a tensor, or of a module when `hf_name` ends in neither .weight nor .bias.

        Raises:
            ValueError: llama.cpp's version of the family has no such tensor.
        """
        name = self._names.get_name(hf_name, (".weight", ".bias"))
        if name is None or (self.architecture.name.startswith("gemma") and hf_name.startswith("lm_head")):
            raise ValueError(f"{hf_name}: a GGUF file of {self.architecture.name} has no place for this tensor")
        return name

    def values(self, hf_name: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor [out, ...] as GGUF holds it: rows reordered, norms shifted (those in float32)."""
        if self.architecture.interleaved and ".self_attn." in hf_name:
            module = hf_name.split(".self_attn.")[1].split(".")[0]
            heads = {"q_proj": self._heads, "k_proj": self._kv_heads}.get(module)
            if heads is not None:
                halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
                return halves.swapaxes(1, 2).reshape(tensor.shape)
        if self.architecture.norm_offset and hf_name.endswith("norm.weight"):
            return tensor.astype(np.float32) + np.float32(self.architecture.norm_offset)
        return tensor

    def _sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        partial = (_rope_parameters(config)[0].get("partial_rotary_factor") or config.get("partial_rotary_factor")) or 1
        return {
            "block_count": self.layers,
            "context_length": config.get("max_position_embeddings") or 2048,
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "attention.head_count": self._heads,
            "attention.head_count_kv": self._kv_heads,
            "attention.key_length": self._head_dim,
            "attention.value_length": self._head_dim,
            "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps") or 1e-6),
            "rope.dimension_count": int(self._head_dim * partial),
        }


class _Rope(dict[str, Any]):
    """Rope parameters; looking up one that is missing raises an error that says what to do."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"config.json: rope scaling {self.get('rope_type')!r} lacks {key}; complete the file")


def _rope_parameters(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], float | None]:
    """The parameters of layers that see everything, in transformers 5's form, and the base of windowed layers."""
    parameters = config.get("rope_parameters")
    if parameters and "full_attention" in parameters:
        return _Rope(parameters["full_attention"]), parameters.get("sliding_attention", {}).get("rope_theta")
    scaling = parameters or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    return _Rope({**scaling, "rope_type": kind, "rope_theta": theta}), config.get("rope_local_base_freq")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, local_theta = _rope_parameters(config)
    kind = rope["rope_type"]
    metadata: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if local_theta is not None:
        metadata["rope.freq_base_swa"] = float(local_theta)
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        if rope.get("truncate") is False:
            raise NotImplementedError("config.json: yarn's truncate is false, which GGUF cannot say")
        metadata["rope.scaling.original_context_length"] = int(_original_context(config, rope))
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                metadata[f"rope.scaling.yarn_{name}"] = float(rope[name])
        factor, attention = rope["factor"], rope.get("attention_factor")
        mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if attention is None and mscale and of_all:
            attention = yarn_attention(factor, mscale) / yarn_attention(factor, of_all)
        if attention is not None:
            # llama.cpp multiplies its own factor by this one.
            metadata["rope.scaling.attn_factor"] = attention / yarn_attention(factor)
    if kind in ("longrope", "su"):
        original = _original_context(config, rope)
        ratio = rope.get("factor") or config["max_position_embeddings"] / original
        attention = rope.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        metadata |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": float(attention)}
        metadata["rope.scaling.original_context_length"] = int(original)
    elif config["model_type"] == "phi3":
        metadata["rope.scaling.original_context_length"] = int(_original_context(config, rope))
    return metadata


def _original_context(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    keys = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return keys or config["max_position_embeddings"]


def _rotary_factors(config: Mapping[str, Any], head_dim: int) -> dict[str, np.ndarray]:
    rope, _ = _rope_parameters(config)
    kind = rope["rope_type"]
    if kind in ("longrope", "su"):
        return {
            "rope_factors_long.weight": np.asarray(rope["long_factor"], np.float32),
            "rope_factors_short.weight": np.asarray(rope["short_factor"], np.float32),
        }
    if kind == "freq_factors":
        return {"rope_freqs.weight": np.asarray(rope["factors"], np.float32)}
    if kind != "llama3":
        return {}
    factors = llama3_factors(rope, rope["rope_theta"], head_dim).astype(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(
            "config.json: its llama3 rope scaling gives factors that are no numbers above zero; complete it"
        )
    return {"rope_freqs.weight": factors}


def _windows(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            metadata[key] = float(config[key])
    window = config.get("sliding_window")
    if config.get("use_sliding_window", True) is False:
        window = None
    if architecture.window_every is not None:
        # 0 tells llama.cpp that a Phi has no windows.
        if window is not None or architecture.name == "phi3":
            metadata["attention.sliding_window"] = window or 0
        if architecture.name == "phi3" and window is not None and window < (config.get("max_position_embeddings") or 0):
            log.warning("llama.cpp does not apply the sliding window of phi3: beyond %d tokens it sees more", window)
    elif window is not None and window < (config.get("max_position_embeddings") or 0):
        log.warning("llama.cpp has no sliding windows for %s: beyond %d tokens it sees more", architecture.name, window)
    return metadata


def _refuse_what_llama_cpp_lacks(config: Mapping[str, Any], architecture: Architecture, head_dim: int) -> None:
    kind = _rope_parameters(config)[0]["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3", "longrope", "su", "freq_factors"):
        raise NotImplementedError(f"config.json: rope type {kind!r} cannot be written as GGUF; llama.cpp has none such")
    every, types = architecture.window_every, config.get("layer_types")
    if every and every > 1 and types:
        expected = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(types))]
        if list(types) != expected:
            raise NotImplementedError(
                f"config.json: layer_types is not the pattern of {every} that llama.cpp has for {architecture.name}"
            )
    width = config["num_attention_heads"] * head_dim
    if architecture.name in ("qwen2", "phi3") and width != config["hidden_size"]:
        raise NotImplementedError(
            f"config.json: {config['num_attention_heads']} heads of {head_dim} are {width} wide, hidden_size is "
            f"{config['hidden_size']}; llama.cpp has {architecture.name} only where the two are equal"
        )
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None:
        # llama.cpp knows the 27B models, which scale otherwise, by their number of layers.
        big = {"gemma2": 46, "gemma3": 62}.get(architecture.name) == config["num_hidden_layers"]
        expected_scalar = config["hidden_size"] // config["num_attention_heads"] if big else head_dim
        if scalar != expected_scalar:
            raise NotImplementedError(
                f"config.json: query_pre_attn_scalar is {scalar}, and llama.cpp has {expected_scalar} for this size"
            )
