"""Weights of real models that products with a packed weight are tested, measured and tuned on."""

from __future__ import annotations

from pallas_kernels.nf4.specs import SPECS as SPECS

# Rows of x: a decoded token, speculative and batched decoding, prompts, training.
ROWS = (1, 16, 64, 256, 512, 2048, 8192)
