"""Dynamic loss scaling for float16 (arXiv:1710.03740): gradients are kept in range by a power of two that follows
overflows."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jax import Array

GROWTH_INTERVAL = 2000
LARGEST_SCALE = 2.0**24


@flax.struct.dataclass
class LossScale:
    """scale: float32, multiplies the loss. good_steps: int32, finite steps since the scale last changed."""

    scale: Array
    good_steps: Array

    @classmethod
    def start(cls) -> LossScale:
        """The usual first scale, 2^16."""
        return cls(jnp.float32(2.0**16), jnp.int32(0))

    def after(self, finite: Array) -> LossScale:
        """Halved where a gradient was not finite (at least 1), doubled after GROWTH_INTERVAL finite steps."""
        grown = self.good_steps + 1 >= GROWTH_INTERVAL
        scale_if_finite = jnp.where(grown, jnp.minimum(self.scale * 2, LARGEST_SCALE), self.scale)
        scale = jnp.where(finite, scale_if_finite, jnp.maximum(self.scale / 2, 1.0))
        good_steps = jnp.where(finite & ~grown, self.good_steps + 1, 0)
        return LossScale(scale, good_steps)
