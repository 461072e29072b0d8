"""Llama: Llama 1 to 3, SmolLM2, TinyLlama, Yi and whatever else calls itself model_type "llama"."""

from __future__ import annotations

from convert.families import common
from convert.families.table import Family

FAMILY = Family(
    "llama",
    (
        *common.EMBEDDING,
        *common.NORMS,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.mlp(bias="mlp_bias"),
        *common.FINAL,
    ),
    common.facts,
    ignored=common.IGNORED,
)
