"""Gated linear unit of the MLP."""

from pallas_kernels.glu.api import glu, glu_backward, glu_forward

__all__ = ["glu", "glu_backward", "glu_forward"]
