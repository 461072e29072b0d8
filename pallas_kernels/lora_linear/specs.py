"""What adapted layers of real models are tested, measured and tuned with; the weights are those of `nf4.specs`."""

from __future__ import annotations

RANK, SCALING = 64, 2.0
# Rows of x in training: 4 x 2,048 tokens.
ROWS = 8192
