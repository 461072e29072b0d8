"""Attention whose keys were cut into parts, before the parts' softmax is put together."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionParts:
    """One token of each row, [B, 1, N H] in `dtype` once it is `joined`.

    out: float32 [B, P, N, H], of each part its weights' product with the values, weights divided by exp(highest).
    highest, total: float32 [B, P, N], each part's largest score and the sum of its weights.
    """

    out: Float32[Array, "B P N H"]
    highest: Float32[Array, "B P N"]
    total: Float32[Array, "B P N"]
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole."""
        b, _, n, h = self.out.shape
        return b, 1, n * h

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    def joined(self) -> Float[Array, "B 1 NH"]:
        """The whole."""
        weights = jnp.exp(self.highest - jnp.max(self.highest, axis=1, keepdims=True))
        total = jnp.sum(self.total * weights, axis=1)
        out = jnp.sum(self.out * weights[..., None], axis=1) / divisor(total)[..., None]
        return out.astype(self.dtype).reshape(self.shape)


def divisor(total: Array) -> Array:
    """Sums of weights to divide by: padding that is a query sees nothing."""
    return jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
