"""What products in 8 bits are tested, measured and tuned with: the linears of real models, in training."""

from __future__ import annotations

from pallas_kernels.nf4.specs import SPECS as SPECS

ROWS = 8192
