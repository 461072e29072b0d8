"""Mistral: 7B, Nemo (whose heads are narrower than D / N), Small, and what shares their form."""

from __future__ import annotations

from convert.families import common
from convert.families.table import Family

FAMILY = Family(
    "mistral",
    (*common.EMBEDDING, *common.NORMS, *common.attention(), *common.mlp(), *common.FINAL),
    common.facts,
    ignored=common.IGNORED,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
)
