"""A whole MLP with its norm, in slices of its width."""

from pallas_kernels.sliced_mlp.api import most_slices, sliced_mlp

__all__ = ["most_slices", "sliced_mlp"]
