"""Gated units of real models that are tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# (MLP width, activation): the models' own is silu, or gelu_tanh for the Gemmas; each width is measured with all three.
SPECS = {
    f"{model}/{activation}": (shape.mlp, activation)
    for model, shape in MODELS.items()
    for activation in ("silu", "gelu_tanh", "gelu")
}
