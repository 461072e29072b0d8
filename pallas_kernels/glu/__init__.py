"""Gated linear unit of the MLP."""

from pallas_kernels.glu.api import glu

__all__ = ["glu"]
