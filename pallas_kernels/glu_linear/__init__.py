"""Gated linear unit and the adapted linear layer behind it, as one block."""

from pallas_kernels.glu_linear.api import glu_linear

__all__ = ["glu_linear"]
