"""Adapters of real models that the optimizer is tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

RANK = 64

# (layers, parameters a layer): rank 64 on all linear layers, 168 million for Llama-3-8B.
SPECS = {
    model: (shape.layers, sum(RANK * (rows + columns) for rows, columns in shape.linears.values()))
    for model, shape in MODELS.items()
}
