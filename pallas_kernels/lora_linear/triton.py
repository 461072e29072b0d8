"""Adapted linear layers in the extended form (see projection.py), with weights decoded by the Triton kernel.

Why it exists: on the gate projection of an 8B model adapters in products of their own cost 23 % of the base's time, as
columns of the base's product 4 %. Numerics: base and adapter are summed in float32 and rounded once; the low-rank
product itself is rounded to x's dtype. Saved for the backward pass: x and its low-rank product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.lora_linear.projection import (
    Group,
    block_b,
    dot,
    extended_columns,
    extended_rows,
    low_rank,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
    with_bias,
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lora_linear_triton(x: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float) -> Array:
    """[M, K] -> [M, sum of N]; see `pallas_kernels.lora_linear.api`."""
    return _fwd(x, group, dropout_key, scaling, dropout_rate)[0]


def extended_product(
    padded: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float
) -> tuple[Array, Array]:
    """The forward product of an input [M, K + tail] whose last columns are zero: [M, sum of N], and x A^T."""
    tail = tail_width(group, extended=True)
    k = padded.shape[1] - tail
    t = low_rank(padded, stacked_a(group, tail, scaling, padded.dtype), group, dropout_key, dropout_rate)
    return _product(lax.dynamic_update_slice(padded, t, (0, k)), group, tail), t


def _product(extended: Array, group: Group, tail: int) -> Array:
    w, extended = extended_columns(group, tail, extended)
    return with_bias(dot(extended, w, 1), group)


def narrow_backward(dy: Array, a: Array, group: Group) -> tuple[Array, Array]:
    """dX [M, K] of one layer without dropout, and the low-rank gradient [M, tail]; a: `stacked_a`.

    One product `[dY, dY B] [W; s A]`, which pays where dY is not wider than x.
    """
    dt = dot(dy, block_b(group, a.shape[0], dy.dtype), 0)
    w, extended = extended_rows(group[0], a, jnp.concatenate([dy, dt], axis=1))
    return dot(extended, w, 0), dt


def _fwd(
    x: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float
) -> tuple[Array, tuple[Any, ...]]:
    tail = tail_width(group, extended=True)
    t = low_rank(x, stacked_a(group, tail, scaling, x.dtype), group, dropout_key, dropout_rate)
    # x stays as it is for the backward pass, so that room behind it would be a copy, and filling that another.
    return _product(jnp.concatenate([x, t], axis=1), group, tail), (x, t, group, dropout_key)


def _bwd(scaling: float, dropout_rate: float, residuals: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    x, t, group, dropout_key = residuals
    tail = tail_width(group, extended=True)
    a = stacked_a(group, tail, scaling, x.dtype)
    if len(group) == 1 and (dropout_rate == 0.0 or dropout_key is None) and dy.shape[1] <= x.shape[1]:
        dx, dt = narrow_backward(dy, a, group)
        return dx, split_gradients(group, scaling * outer(dt, x), outer_transposed(t, dy)), None
    w, dy = extended_columns(group, tail, dy)
    dx_dt = dot(dy, w, 0)
    dx, dt = dx_dt[:, :-tail], dx_dt[:, -tail:]
    through_adapter, d_a = low_rank_backward(dt, x, a, group, dropout_key, dropout_rate)
    return dx + through_adapter, split_gradients(group, scaling * d_a, outer_transposed(t, dy)), None


lora_linear_triton.defvjp(_fwd, _bwd)
