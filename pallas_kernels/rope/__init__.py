"""Rotary position embedding."""

from pallas_kernels.rope.api import rope, split_rope, split_rope_into_cache

__all__ = ["rope", "split_rope", "split_rope_into_cache"]
