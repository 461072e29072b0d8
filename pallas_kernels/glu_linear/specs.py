"""Down projections of real models, behind their gated unit: what is tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# (outputs, MLP width)
SPECS = {f"{model}/down_proj": shape.linears["down_proj"] for model, shape in MODELS.items()}
