"""Residual addition, RMSNorm and the adapted linear layers behind it, as one block."""

from pallas_kernels.norm_linear.api import norm_linear

__all__ = ["norm_linear"]
