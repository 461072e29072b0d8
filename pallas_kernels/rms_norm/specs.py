"""Rows of real models that RMSNorm is tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels._specs import MODELS

# Width of a row: the residual stream, and the heads of the models that normalise queries and keys.
SPECS = {model: shape.hidden for model, shape in MODELS.items()}
SPECS |= {
    f"{model}/heads": shape.head_width for model, shape in MODELS.items() if model.startswith(("qwen3", "gemma-3"))
}
