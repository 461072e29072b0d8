"""Heads of real models, and masks, that attention is tested, measured and tuned on."""

from __future__ import annotations

import dataclasses

from pallas_kernels._specs import MODELS

# (query heads, key heads, head width)
SPECS = {model: (shape.heads, shape.kv_heads, shape.head_width) for model, shape in MODELS.items()}


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query sees. documents: whether a row holds four of unequal length; window, cap: as in `attention`."""

    name: str
    documents: bool = False
    window: int | None = None
    cap: float | None = None


MASKS = (
    Mask("causal"),
    Mask("packed", documents=True),
    Mask("packed, soft-cap", documents=True, cap=50.0),
    Mask("packed, window", documents=True, window=512),
)
