"""Products with a packed NF4 weight."""

from pallas_kernels.nf4_matmul.api import nf4_matmul

__all__ = ["nf4_matmul"]
