"""Weights of real models that the NF4 ops are tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# (out, in) -> the first model and layer that has it: each distinct weight once.
WEIGHTS: dict[tuple[int, int], str] = {}
for _model, _shape in MODELS.items():
    for _layer, _weight in _shape.linears.items():
        WEIGHTS.setdefault(_weight, f"{_model}/{_layer}")

SPECS = {name: weight for weight, name in WEIGHTS.items()}
