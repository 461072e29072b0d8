"""Causal self-attention with grouped heads and packed documents."""

from pallas_kernels.attention.api import attention, attention_into_cache, cached_attention
from pallas_kernels.attention.parts import AttentionParts

__all__ = ["AttentionParts", "attention", "attention_into_cache", "cached_attention"]
