"""Normalisation and the linear layers behind it as one differentiable block, through Triton and cuBLAS.

Why it exists: the normalisation writes the operand that already has room for the adapters' columns, and its backward
pass takes in the gradients of adapter and residual stream. Saved for the backward pass: the residual stream, one
number a row, and the low-rank product. The normalised rows are not: the gradient of lora_a is their product with the
low-rank gradient, in which the row's number and the column's scale factor out. Numerics: as lora_linear's extended
form; the gradient of lora_a does not see the rounding of the normalised rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.lora_linear.projection import (
    Group,
    dot,
    extended_columns,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
)
from pallas_kernels.lora_linear.triton import extended_product
from pallas_kernels.rms_norm.triton import rms_norm_backward_triton, rms_norm_forward_triton


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def norm_linear_triton(
    x: Array,
    residual: Array | None,
    scale: Array,
    group: Group,
    dropout_key: Array | None,
    eps: float,
    unit_offset: bool,
    scaling: float,
    dropout_rate: float,
    name: str | None,
) -> tuple[Array, Array]:
    """[M, D] -> [M, sum of N] and [M, D]; see `pallas_kernels.norm_linear.api`."""
    return _fwd(x, residual, scale, group, dropout_key, eps, unit_offset, scaling, dropout_rate, name)[0]


def _fwd(
    x: Array,
    residual: Array | None,
    scale: Array,
    group: Group,
    dropout_key: Array | None,
    eps: float,
    unit_offset: bool,
    scaling: float,
    dropout_rate: float,
    name: str | None,
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    tail = tail_width(group, extended=True)
    padded, inverse, total = rms_norm_forward_triton(x, scale, residual, eps, unit_offset, tail)
    y, t = extended_product(padded, group, dropout_key, scaling, dropout_rate)
    if name is not None:
        y, t, total = (
            checkpoint_name(y, name),
            checkpoint_name(t, f"{name}_low_rank"),
            checkpoint_name(total, f"{name}_input"),
        )
    # An empty tuple has no leaves, but tells the backward pass that there was a residual.
    had_residual = None if residual is None else ()
    return (y, total), (total, inverse, t, scale, group, dropout_key, had_residual)


def _bwd(
    eps: float,
    unit_offset: bool,
    scaling: float,
    dropout_rate: float,
    name: str | None,
    residuals: tuple[Any, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Any, ...]:
    total, inverse, t, scale, group, dropout_key, had_residual = residuals
    dy, d_total = cotangents
    tail = tail_width(group, extended=True)
    w, dy = extended_columns(group, tail, dy)
    dh_dt = dot(dy, w, 0)
    dt, a = dh_dt[:, -tail:], stacked_a(group, tail, scaling, dy.dtype)
    if dropout_rate == 0.0 or dropout_key is None:
        extra = dot(dt, a, 0)
        weight = scale.astype(jnp.float32) + (1.0 if unit_offset else 0.0)
        d_a = outer((dt * inverse[:, None]).astype(dt.dtype), total) * weight
    else:
        h = rms_norm_forward_triton(total, scale, None, eps, unit_offset, 0)[0]
        extra, d_a = low_rank_backward(dt, h, a, group, dropout_key, dropout_rate)
    dx = rms_norm_backward_triton(total, scale, inverse, dh_dt, extra, d_total, unit_offset)
    gradients = split_gradients(group, scaling * d_a, outer_transposed(t, dy))
    return dx, None if had_residual is None else dx, None, gradients, None


norm_linear_triton.defvjp(_fwd, _bwd)
