"""Every family that is read, in the forms that its models come in: what parity, round trips and the README go by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peers
import torch
import transformers

# Defaults of families lie beyond so small a vocabulary.
SIZES: dict[str, Any] = peers.SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Rows of whole blocks of 64: what bitsandbytes' generic code decodes rightly, and fused matrices are cut at.
BLOCK_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
_GEMMA = ("gemma", "gemma2", "gemma3_text")
# transformers counts Phi-3's rotary factors by D / N.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 56, "sliding_window": None},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 7, "query_pre_attn_scalar": 14},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 7, "query_pre_attn_scalar": 14},
    "mistral": {"sliding_window": 7},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """model_type: HF's name. changes: of the config. old: config.json with the keys of transformers 4.

    tokens: how long the rows are that it is compared on.
    """

    model_type: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    old: bool = False
    tokens: int = 40


def _rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
_LONGROPE = {
    **_rope(
        "longrope",
        short_factor=[1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.5],
        long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
        original_max_position_embeddings=64,
    ),
    "original_max_position_embeddings": 64,
}
_DYNAMIC = _rope("dynamic", factor=2.0) | {"max_position_embeddings": 64}
_OTHER_YARN = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16, beta_slow=2, attention_factor=1.3
)
_PARTIAL = _rope("default", partial_rotary_factor=0.72)
_UPPER_WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA3_LINEAR = {
    "layer_types": [_SLIDING, _FULL, _SLIDING],
    "rope_parameters": {
        _FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
}

# The plain form of each family, which every round trip goes through.
PLAIN: dict[str, Case] = {
    "Llama": Case("llama"),
    "Mistral": Case("mistral"),
    "Qwen2": Case("qwen2"),
    "Qwen3": Case("qwen3"),
    "Gemma": Case("gemma"),
    "Gemma 2": Case("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "Gemma 3": Case("gemma3_text", {"num_hidden_layers": 7}),
    "Phi-3": Case("phi3"),
}
FORMS: dict[str, Case] = {
    "Llama, llama3 rope": Case("llama", _LLAMA3, tokens=150),
    "Llama, llama3 rope, old config": Case("llama", _LLAMA3, old=True, tokens=150),
    "Llama, linear rope, old config": Case("llama", _rope("linear", 20000.0, factor=2.5), old=True),
    "Llama, dynamic rope within its context": Case("llama", _rope("dynamic", factor=2.0)),
    "Llama, dynamic rope beyond its context": Case("llama", _DYNAMIC, tokens=150),
    "Llama, dynamic rope, old config": Case("llama", _DYNAMIC, old=True, tokens=150),
    "Llama, yarn rope": Case("llama", _YARN, tokens=150),
    "Mistral without a window": Case("mistral", {"sliding_window": None}),
    "Mistral, another theta, old config": Case("mistral", _rope("default", 300000.0), old=True),
    "Qwen2, windows in the upper layers": Case("qwen2", _UPPER_WINDOWS | {"tie_word_embeddings": True}),
    "Qwen2, windows, old config": Case("qwen2", _UPPER_WINDOWS, old=True),
    "Qwen2, yarn rope, old config": Case("qwen2", _YARN, old=True, tokens=150),
    "Qwen3, biases": Case("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "Qwen3, yarn rope with speeds of its own": Case("qwen3", _OTHER_YARN, tokens=150),
    "Gemma, old config": Case("gemma", old=True),
    "Gemma 2, other layer types": Case(
        "gemma2", {"query_pre_attn_scalar": 9, "layer_types": [_FULL, _SLIDING, _SLIDING]}
    ),
    "Gemma 2, old config": Case("gemma2", old=True),
    "Gemma 3, linear rope in full layers": Case("gemma3_text", _GEMMA3_LINEAR),
    "Gemma 3, old config": Case("gemma3_text", _GEMMA3_LINEAR, old=True),
    "Phi-3, window": Case("phi3", {"sliding_window": 7}),
    "Phi-3, partial rotation": Case("phi3", _PARTIAL),
    "Phi-3, partial rotation, old config": Case("phi3", _PARTIAL, old=True),
    "Phi-3, longrope within its original context": Case("phi3", _LONGROPE),
    "Phi-3, longrope beyond its original context": Case("phi3", _LONGROPE, tokens=150),
    "Phi-3, longrope, old config": Case("phi3", _LONGROPE, old=True, tokens=150),
}
CASES = PLAIN | FORMS
# Forms that llama.cpp has, beside the plain ones: no window in Mistral and Qwen2, and not every rotation.
GGUF_CASES = [name for name in PLAIN if name != "Mistral"] + [
    "Mistral without a window",
    "Llama, llama3 rope",
    "Llama, yarn rope",
    "Qwen3, yarn rope with speeds of its own",
    "Phi-3, window",
    "Phi-3, partial rotation",
    "Phi-3, longrope beyond its original context",
]
_MODELS = {
    "Llama": "Llama 2, 3, 3.1 to 3.3, SmolLM2, TinyLlama, Yi",
    "Mistral": "Mistral 7B, Nemo, Small",
    "Qwen2": "Qwen2, Qwen2.5",
    "Qwen3": "Qwen3, dense",
    "Gemma": "Gemma 1",
    "Gemma 2": "Gemma 2",
    "Gemma 3": "Gemma 3, text",
    "Phi-3": "Phi-3, 3.5, Phi-4",
}


def support_table() -> str:
    """The README's table: per family its models, the rope scalings and forms compared, and files read and written."""
    lines = [
        "| family | models | forms compared | safetensors, bitsandbytes 4-bit, PEFT | GGUF |",
        "|---|---|---|---|---|",
    ]
    for name in PLAIN:
        forms = [case for case in CASES.values() if case.model_type == PLAIN[name].model_type]
        gguf = "in, out" if name in GGUF_CASES else "in, out, without windows"
        lines.append(f"| {name} | {_MODELS[name]} | {len(forms)} | in, out | {gguf} |")
    return "\n".join(lines) + "\n"


def save(directory: Path, case: Case, *, seed: int = 0, std: float = 0.15, **changes: Any) -> Any:
    """Save the case's model, of random parameters all of which matter, as transformers does; the model in float32."""
    sizes = SIZES | _OF_FAMILY.get(case.model_type, {}) | case.changes | changes
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(case.model_type, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    one = 0.0 if case.model_type in _GEMMA else 1.0
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=one if "norm" in name else 0.0, std=std)
    model.save_pretrained(directory)
    if case.old:
        _use_old_keys(directory / "config.json")
    return model


def _use_old_keys(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        config["sliding_window_pattern"] = 2
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # Gemma 3 is younger than this key's older name.
    name = "rope_type" if config["model_type"] == "gemma3_text" else "type"
    if config["model_type"] == "phi3":
        # Beside the scaling, not in it.
        rope.pop("original_max_position_embeddings", None)
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    config["rope_scaling"] = None if kind == "default" else {name: kind, **rope}
    config.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
