"""Rotary position embedding."""

from pallas_kernels.rope.api import rope, split_rope

__all__ = ["rope", "split_rope"]
