"""Adapted linear layers through XLA, in the separate form (see projection.py).

Why it exists: it runs everywhere and is what the kernels are measured against. Numerics: products accumulate in
float32; the base's is rounded to x's dtype, and the adapter's is added to it, so that a GPU can do the addition while
it writes the product. Saved for the backward pass: x, once. A 4-bit weight is decoded again for dX, so no 16-bit weight
outlives a product. The base has no gradient and no gradient of a weight's size is ever made.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from pallas_kernels.lora_linear.projection import (
    Group,
    block_b,
    decoded,
    dot,
    low_rank,
    low_rank_backward,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
    with_bias,
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lora_linear_xla(x: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float) -> Array:
    """[M, K] -> [M, sum of N]; see `pallas_kernels.lora_linear.api`."""
    w, x = decoded(group, x)
    y = with_bias(dot(x, w, 1), group)
    tail = tail_width(group, extended=False)
    if tail:
        t = low_rank(x, stacked_a(group, tail, scaling, x.dtype), group, dropout_key, dropout_rate)
        y = y + dot(t, block_b(group, tail, x.dtype), 1)
    return y


def _fwd(
    x: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float
) -> tuple[Array, tuple[Any, ...]]:
    return lora_linear_xla(x, group, dropout_key, scaling, dropout_rate), (x, group, dropout_key)


def lora_linear_xla_backward(
    scaling: float, dropout_rate: float, residuals: tuple[Any, ...], dy: Array
) -> tuple[Any, ...]:
    """The cotangents of x, the group and the key, from x, the group and the key."""
    x, group, dropout_key = residuals
    w, dy = decoded(group, dy)
    dx = dot(dy, w, 0)
    tail = tail_width(group, extended=False)
    if not tail:
        return dx, split_gradients(group, None, None), None
    a, b = stacked_a(group, tail, scaling, x.dtype), block_b(group, tail, x.dtype)
    dt, t = dot(dy, b, 0), low_rank(x, a, group, dropout_key, dropout_rate)
    through_adapter, d_a = low_rank_backward(dt, x, a, group, dropout_key, dropout_rate)
    return dx + through_adapter, split_gradients(group, scaling * d_a, outer_transposed(t, dy)), None


lora_linear_xla.defvjp(_fwd, lora_linear_xla_backward)
