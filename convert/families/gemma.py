"""Gemma: 1, 2 (norms of what attention and MLP give) and the text models of 3 (norms of queries and keys too)."""

from __future__ import annotations

from typing import Any

from convert.families import common
from convert.families.table import Family

_ATTENTION = common.attention(qkv_bias="attention_bias", o_bias="attention_bias")
# What Llama calls post_attention_layernorm stands before the MLP; Gemma 2 means what its name says.
_FOUR_NORMS = (
    *common.norm("input_layernorm"),
    *common.norm("post_attention_layernorm", "attention_output_norm"),
    *common.norm("pre_feedforward_layernorm", "post_attention_layernorm"),
    *common.norm("post_feedforward_layernorm", "mlp_output_norm"),
)
_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
}
_DEFAULTS_2 = _DEFAULTS | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}

GEMMA = Family(
    "gemma",
    (*common.EMBEDDING, *common.NORMS, *_ATTENTION, *common.mlp(), *common.FINAL),
    common.facts,
    ignored=common.IGNORED,
    defaults=_DEFAULTS | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
)
GEMMA2 = Family(
    "gemma2",
    (*common.EMBEDDING, *_FOUR_NORMS, *_ATTENTION, *common.mlp(), *common.FINAL),
    common.facts,
    ignored=common.IGNORED,
    defaults=_DEFAULTS_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)
GEMMA3 = Family(
    "gemma3_text",
    (*common.EMBEDDING, *_FOUR_NORMS, *common.QK_NORMS, *_ATTENTION, *common.mlp(), *common.FINAL),
    common.facts,
    ignored=common.IGNORED,
    defaults=_DEFAULTS_2
    | {"max_position_embeddings": 131072, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
)
