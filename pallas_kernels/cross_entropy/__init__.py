"""Language-model head and cross-entropy loss as one op."""

from pallas_kernels.cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
