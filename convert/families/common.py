"""The lines that many tables share, and the facts that configs of all families state alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.families.checks import check_sizes
from convert.families.table import Rule

_LAYER = "model.layers.{i}"

EMBEDDING = (Rule("model.embed_tokens.weight", "embed_tokens/embedding", "V D"),)
FINAL = (Rule("model.norm.weight", "norm/scale", "D"), Rule("lm_head.weight", "lm_head/kernel", "V D", when="untied"))
# What old versions of transformers saved beside the weights.
IGNORED = (r"\.rotary_emb\.inv_freq$",)


def linear(module: str, shape: str, *, bias: str | None = None) -> tuple[Rule, ...]:
    """One linear of every layer.

    Args:
        module: its HF name in the layer, such as "self_attn.q_proj", which is also its place in ours.
        shape: [out, in] in letters.
        bias: "always", or the fact about the config with which it has a bias; None for never.
    """
    path = f"layers/{module.replace('.', '/')}"
    weight = Rule(f"{_LAYER}.{module}.weight", f"{path}/kernel", shape)
    if bias is None:
        return (weight,)
    when = None if bias == "always" else bias
    return weight, Rule(f"{_LAYER}.{module}.bias", f"{path}/bias", shape.split()[0], when=when)


def fused(module: str, parts: Mapping[str, str], columns: str) -> tuple[Rule, ...]:
    """One HF linear of every layer in which several of ours stand one below the other.

    Args:
        module: its HF name in the layer, such as "self_attn.qkv_proj".
        parts: our name of each, from the top, and its rows in letters.
        columns: of all, in letters.
    """
    group = module.partition(".")[0]
    return tuple(
        Rule(
            f"{_LAYER}.{module}.weight",
            f"layers/{group}/{name}/kernel",
            f"{rows} {columns}",
            fused=tuple(parts.values()),
            part=part,
        )
        for part, (name, rows) in enumerate(parts.items())
    )


def norm(hf: str, ours: str | None = None, size: str = "D") -> tuple[Rule, ...]:
    """One norm of every layer; `ours` is its place in our layer where that is not HF's name."""
    return (Rule(f"{_LAYER}.{hf}.weight", f"layers/{(ours or hf).replace('.', '/')}/scale", size),)


def attention(*, qkv_bias: str | None = None, o_bias: str | None = None) -> tuple[Rule, ...]:
    """Four linears of their own; the biases as in `linear`."""
    return (
        *linear("self_attn.q_proj", "N*H D", bias=qkv_bias),
        *linear("self_attn.k_proj", "K*H D", bias=qkv_bias),
        *linear("self_attn.v_proj", "K*H D", bias=qkv_bias),
        *linear("self_attn.o_proj", "D N*H", bias=o_bias),
    )


def mlp(*, bias: str | None = None) -> tuple[Rule, ...]:
    """Three linears of their own; the bias as in `linear`."""
    return (
        *linear("mlp.gate_proj", "F D", bias=bias),
        *linear("mlp.up_proj", "F D", bias=bias),
        *linear("mlp.down_proj", "D F", bias=bias),
    )


QK_NORMS = (*norm("self_attn.q_norm", size="H"), *norm("self_attn.k_norm", size="H"))
# Before attention, and before the MLP.
NORMS = (*norm("input_layernorm"), *norm("post_attention_layernorm"))


def facts(config: Mapping[str, Any]) -> dict[str, int]:
    """HF config -> the letters' values and the truth of every `when`.

    Raises:
        ValueError: sizes are missing or absurd.
    """
    letters = {
        "D": "hidden_size",
        "N": "num_attention_heads",
        "F": "intermediate_size",
        "V": "vocab_size",
        "L": "num_hidden_layers",
    }
    check_sizes(config, tuple(letters.values()))
    found = {letter: config[key] for letter, key in letters.items()}
    # Files older than grouped queries, and those that leave the usual width out, rely on these defaults.
    found["K"] = config.get("num_key_value_heads") or found["N"]
    found["H"] = config.get("head_dim") or found["D"] // found["N"]
    found["attention_bias"] = bool(config.get("attention_bias", False))
    found["mlp_bias"] = bool(config.get("mlp_bias", False))
    found["untied"] = not config.get("tie_word_embeddings", False)
    return found
