"""Language-model head and cross-entropy loss as one op."""

from pallas_kernels.cross_entropy.api import chunk_tokens, linear_cross_entropy
from pallas_kernels.cross_entropy.head import Int8Head, quantize_head
from pallas_kernels.cross_entropy.xla import Vocabulary

__all__ = ["Int8Head", "Vocabulary", "chunk_tokens", "linear_cross_entropy", "quantize_head"]
