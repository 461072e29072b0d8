"""Names of a Llama model's tensors: GGUF's and Hugging Face's."""

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
# Per-frequency divisors of the rotary embedding (Llama 3.1): part of the configuration, not a weight.
ROPE_FACTORS = "rope_freqs.weight"


def hf_name(name: str) -> str | None:
    """Return the Hugging Face name of "blk.0.attn_q.weight" and the like; None for what a Llama model has not."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    block, _, layer_and_module = stem.partition(".")
    layer, _, module = layer_and_module.partition(".")
    if block == "blk" and layer.isdecimal() and module in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[module]}.{kind}"
    return None
