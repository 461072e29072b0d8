"""Causal self-attention with grouped heads and packed documents."""

from pallas_kernels.attention.api import attention, cached_attention

__all__ = ["attention", "cached_attention"]
