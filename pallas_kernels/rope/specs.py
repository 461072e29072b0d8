"""Heads of real models that rotary embedding is tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# (query heads, key heads, head width)
SPECS = {model: (shape.heads, shape.kv_heads, shape.head_width) for model, shape in MODELS.items()}
