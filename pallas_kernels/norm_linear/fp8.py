"""Normalisation and the linear layers behind it, the base's products in 8-bit floating point, as one block.

Why it exists: the norm's result is rounded to 8 bits where it is made, and is not kept for the backward pass. Saved:
what norm_linear's Triton form saves (the residual stream, one number a row, the low-rank product). Numerics:
lora_linear's 8-bit form; the gradient of lora_a does not see the rounding of the normalised rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.lora_linear.fp8 import base_product_transposed, forward, forward_tail, low_rank_gradient
from pallas_kernels.lora_linear.projection import (
    Group,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
)
from pallas_kernels.rms_norm import rms_norm_backward, rms_norm_forward


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def norm_linear_fp8(
    x: Array,
    residual: Array | None,
    scale: Array,
    group: Group,
    dropout_key: Any,
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
    dropout_key: Any,
    eps: float,
    unit_offset: bool,
    scaling: float,
    dropout_rate: float,
    name: str | None,
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    options: Any = {"residual": residual, "eps": eps, "unit_offset": unit_offset, "tail": forward_tail(group)}
    h, inverse, total = rms_norm_forward(x, scale, **options)
    y, t = forward(h, group, dropout_key, scaling, dropout_rate)
    if name is not None:
        y, total = checkpoint_name(y, name), checkpoint_name(total, f"{name}_input")
        t = None if t is None else checkpoint_name(t, f"{name}_low_rank")
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
    through_adapter, extra, gradients = None, None, split_gradients(group, None, None)
    if t is not None:
        a, dt = stacked_a(group, t.shape[1], scaling, dy.dtype), low_rank_gradient(dy, t, group)
        if dropout_rate == 0.0 or dropout_key is None:
            through_adapter = dt, a.T
            weight = scale.astype(jnp.float32) + (1.0 if unit_offset else 0.0)
            d_a = outer((dt * inverse[:, None]).astype(dt.dtype), total) * weight
        else:
            h = rms_norm_forward(total, scale, eps=eps, unit_offset=unit_offset)[0]
            extra, d_a = low_rank_backward(dt, h, a, group, dropout_key, dropout_rate)
        gradients = split_gradients(group, scaling * d_a, outer_transposed(t, dy))
    dh = base_product_transposed(dy, group, through_adapter)
    dx = rms_norm_backward(total, scale, inverse, dh, extra=extra, d_total=d_total, unit_offset=unit_offset)
    return dx, None if had_residual is None else dx, None, gradients, None


norm_linear_fp8.defvjp(_fwd, _bwd)
