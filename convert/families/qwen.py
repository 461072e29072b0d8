"""Qwen: Qwen2 and 2.5 have biases on queries, keys and values, Qwen3 norms of queries and keys."""

from __future__ import annotations

from typing import Any

from convert.families import common
from convert.families.table import Family

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = Family(
    "qwen2",
    (*common.EMBEDDING, *common.NORMS, *common.attention(qkv_bias="always"), *common.mlp(), *common.FINAL),
    common.facts,
    ignored=common.IGNORED,
    defaults=_DEFAULTS,
)
QWEN3 = Family(
    "qwen3",
    (
        *common.EMBEDDING,
        *common.NORMS,
        *common.QK_NORMS,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.mlp(),
        *common.FINAL,
    ),
    common.facts,
    ignored=common.IGNORED,
    defaults=_DEFAULTS | {"head_dim": 128},
)
