"""Phi-3, Phi-3.5 and Phi-4, whose files hold queries, keys and values as one matrix, and gate and up as another."""

from __future__ import annotations

from convert.families import common
from convert.families.table import Family

PHI3 = Family(
    "phi3",
    (
        *common.EMBEDDING,
        *common.NORMS,
        *common.fused("self_attn.qkv_proj", {"q_proj": "N*H", "k_proj": "K*H", "v_proj": "K*H"}, "D"),
        *common.linear("self_attn.o_proj", "D N*H"),
        *common.fused("mlp.gate_up_proj", {"gate_proj": "F", "up_proj": "F"}, "D"),
        *common.linear("mlp.down_proj", "D F"),
        *common.FINAL,
    ),
    common.facts,
    ignored=common.IGNORED,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
)
