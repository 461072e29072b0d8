"""Llama: Llama 1 to 3, SmolLM2, TinyLlama and whatever else calls itself model_type "llama"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.families.table import Family, Rule

_LAYER = "model.layers.{i}"

_RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens/embedding", "V D"),
    Rule(f"{_LAYER}.input_layernorm.weight", "layers/input_layernorm/scale", "D"),
    Rule(f"{_LAYER}.self_attn.q_proj.weight", "layers/self_attn/q_proj/kernel", "N*H D"),
    Rule(f"{_LAYER}.self_attn.k_proj.weight", "layers/self_attn/k_proj/kernel", "K*H D"),
    Rule(f"{_LAYER}.self_attn.v_proj.weight", "layers/self_attn/v_proj/kernel", "K*H D"),
    Rule(f"{_LAYER}.self_attn.o_proj.weight", "layers/self_attn/o_proj/kernel", "D N*H"),
    Rule(f"{_LAYER}.self_attn.q_proj.bias", "layers/self_attn/q_proj/bias", "N*H", when="attention_bias"),
    Rule(f"{_LAYER}.self_attn.k_proj.bias", "layers/self_attn/k_proj/bias", "K*H", when="attention_bias"),
    Rule(f"{_LAYER}.self_attn.v_proj.bias", "layers/self_attn/v_proj/bias", "K*H", when="attention_bias"),
    Rule(f"{_LAYER}.self_attn.o_proj.bias", "layers/self_attn/o_proj/bias", "D", when="attention_bias"),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", "layers/post_attention_layernorm/scale", "D"),
    Rule(f"{_LAYER}.mlp.gate_proj.weight", "layers/mlp/gate_proj/kernel", "F D"),
    Rule(f"{_LAYER}.mlp.up_proj.weight", "layers/mlp/up_proj/kernel", "F D"),
    Rule(f"{_LAYER}.mlp.down_proj.weight", "layers/mlp/down_proj/kernel", "D F"),
    Rule(f"{_LAYER}.mlp.gate_proj.bias", "layers/mlp/gate_proj/bias", "F", when="mlp_bias"),
    Rule(f"{_LAYER}.mlp.up_proj.bias", "layers/mlp/up_proj/bias", "F", when="mlp_bias"),
    Rule(f"{_LAYER}.mlp.down_proj.bias", "layers/mlp/down_proj/bias", "D", when="mlp_bias"),
    Rule("model.norm.weight", "norm/scale", "D"),
    Rule("lm_head.weight", "lm_head/kernel", "V D", when="untied"),
)


def _facts(config: Mapping[str, Any]) -> dict[str, int]:
    letters = {
        "D": "hidden_size",
        "N": "num_attention_heads",
        "F": "intermediate_size",
        "V": "vocab_size",
        "L": "num_hidden_layers",
    }
    bad = [key for key in letters.values() if not isinstance(config.get(key), int) or config[key] < 1]
    if bad:
        raise ValueError(f"config.json: {', '.join(bad)} must be whole numbers above zero; take the model's own file")
    facts = {letter: config[key] for letter, key in letters.items()}
    # Files older than grouped queries, and those that leave the usual width out, rely on these defaults.
    facts["K"] = config.get("num_key_value_heads") or facts["N"]
    facts["H"] = config.get("head_dim") or facts["D"] // facts["N"]
    facts["attention_bias"] = bool(config.get("attention_bias", False))
    facts["mlp_bias"] = bool(config.get("mlp_bias", False))
    facts["untied"] = not config.get("tie_word_embeddings", False)
    return facts


FAMILY = Family("llama", _RULES, _facts, ignored=(r"\.rotary_emb\.inv_freq$",))
