"""Dropout of an input that is part of a larger one, as where several devices hold its rows: the part of the whole's
mask, without making the rest of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Bool, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartKey:
    """The key of an array [B, T, K] of which only a part is here, a block of consecutive indices along each axis.

    key: of the whole, as jax.random.key gives it. first: int32 [3], the part's first index along each axis. part,
    whole: shapes.
    """

    key: Key[Array, ""]
    first: Int[Array, " 3"]
    part: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
    whole: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    def keep(self, member: int, probability: float) -> Bool[Array, "M K"]:
        """This part of jax.random.bernoulli(fold_in(key, member), probability, whole), its first two axes as one."""
        folded: Any = jax.random.fold_in(self.key, member)
        words = jax.random.key_data(folded)
        if words.shape != (2,):
            raise NotImplementedError(
                f"dropout on parts of an array needs JAX's threefry keys, not {jax.random.key_impl(folded)}; unset "
                "jax_default_prng_impl"
            )
        _, length, width = self.whole
        b, t, k = (
            jnp.arange(size, dtype=jnp.uint32) + at.astype(jnp.uint32) for size, at in zip(self.part, self.first)
        )
        rows = (b[:, None] * np.uint32(length) + t).reshape(-1)
        high, low = _times(rows, width)
        counts_low = low[:, None] + k
        counts_high = high[:, None] + (counts_low < low[:, None]).astype(jnp.uint32)
        keys = [jnp.broadcast_to(word, counts_low.shape) for word in words]
        first, second = threefry2x32_p.bind(*keys, counts_high, counts_low)
        # The bits as the fraction of a float in [1, 2), as jax.random.uniform makes it.
        bits = ((first ^ second) >> np.uint32(9)) | np.uint32(0x3F800000)
        uniform = lax.bitcast_convert_type(bits, jnp.float32) - 1.0
        return uniform < probability


def _times(x: Array, factor: int) -> tuple[Array, Array]:
    """The high and low 32 bits of x * factor, uint32, by halves of 16 bits."""
    a, b = x >> np.uint32(16), x & np.uint32(0xFFFF)
    c, d = np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    middle = a * d + (b * d >> np.uint32(16))
    across = b * c + (middle & np.uint32(0xFFFF))
    high = a * c + (middle >> np.uint32(16)) + (across >> np.uint32(16))
    return high, x * np.uint32(factor)
