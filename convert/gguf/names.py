"""Names of a model's tensors: GGUF's and Hugging Face's."""

from __future__ import annotations

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What a layer of an architecture has beside, or under another name.
OTHER_LAYER_NAMES = {
    "qwen3": _QK_NORMS,
    "gemma2": _FOUR_NORMS,
    "gemma3": _FOUR_NORMS | _QK_NORMS,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
# Per-frequency divisors of the rotary embedding: part of the configuration, not weights.
FACTORS = {
    "rope_freqs.weight": "all",
    "rope_factors_short.weight": "short",
    "rope_factors_long.weight": "long",
}


def hf_name(name: str, architecture: str = "llama") -> str | None:
    """Return the Hugging Face name of "blk.0.attn_q.weight" and the like; None for what such a model has not."""
    layer_names = LAYER_NAMES | OTHER_LAYER_NAMES.get(architecture, {})
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    block, _, layer_and_module = stem.partition(".")
    layer, _, module = layer_and_module.partition(".")
    if block == "blk" and layer.isdecimal() and module in layer_names:
        return f"model.layers.{layer}.{layer_names[module]}.{kind}"
    return None
