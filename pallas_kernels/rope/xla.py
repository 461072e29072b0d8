"""Rotary position embedding through XLA.

Why it exists: XLA fuses it with what stands beside it, on any device. Numerics: the reference's. Limit: splitting one
product into queries, keys and values costs a pass of its own for each.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.rope.reference import rope_reference


def rotate_xla(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """q and k rotated by their tokens' angles."""
    return rope_reference(q, cos, sin), rope_reference(k, cos, sin)


def split_xla(qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """[B, T, N + 2K, H] -> rotated q and k, and v."""
    q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=2)
    return *rotate_xla(q, k, cos, sin), v


def join_xla(q: Array, k: Array, v: Array, cos: Array, sin: Array) -> Array:
    """The inverse of `split_xla` for angles of the other sign."""
    return jnp.concatenate([*rotate_xla(q, k, cos, sin), v], axis=2)
