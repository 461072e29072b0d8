"""Language-model head and cross-entropy loss as one op."""

from pallas_kernels.cross_entropy.api import chunk_tokens, head_logits, linear_cross_entropy
from pallas_kernels.cross_entropy.head import Head, Int8Head, decoded_head, quantize_head
from pallas_kernels.cross_entropy.xla import Vocabulary

__all__ = [
    "Head",
    "Int8Head",
    "Vocabulary",
    "chunk_tokens",
    "decoded_head",
    "head_logits",
    "linear_cross_entropy",
    "quantize_head",
]
