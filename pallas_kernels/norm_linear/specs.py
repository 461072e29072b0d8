"""Gate and up projections of real models, side by side behind their norm: what is tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# (width, outputs of each of the two)
SPECS = {f"{model}/gate_up": (shape.hidden, shape.mlp) for model, shape in MODELS.items()}
