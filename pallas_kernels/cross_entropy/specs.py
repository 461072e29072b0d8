"""Heads of real models that head and loss are tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# (vocabulary, width)
SPECS = {model: (shape.vocabulary, shape.hidden) for model, shape in MODELS.items()}
