"""Language-model head and cross-entropy loss as one op."""

from pallas_kernels.cross_entropy.api import chunk_tokens, linear_cross_entropy

__all__ = ["chunk_tokens", "linear_cross_entropy"]
