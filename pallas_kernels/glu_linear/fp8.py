"""The gated unit and the linear layer behind it, the base's products in 8-bit floating point, as one block.

Why it exists: the unit is rounded to 8 bits where it is made, and is not kept for the backward pass, which makes it
again while it makes its gradient. Saved: the unit's input and the low-rank product. Numerics: lora_linear's 8-bit form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.glu import glu_backward, glu_forward
from pallas_kernels.lora_linear.fp8 import base_product_transposed, forward, forward_tail, low_rank_gradient
from pallas_kernels.lora_linear.projection import (
    Projection,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def glu_linear_fp8(
    gate_up: Array,
    projection: Projection,
    dropout_key: Any,
    activation: str,
    scaling: float,
    dropout_rate: float,
    name: str | None,
) -> Array:
    """[M, 2F] -> [M, N]; see `pallas_kernels.glu_linear.api`."""
    return _fwd(gate_up, projection, dropout_key, activation, scaling, dropout_rate, name)[0]


def _fwd(
    gate_up: Array,
    projection: Projection,
    dropout_key: Any,
    activation: str,
    scaling: float,
    dropout_rate: float,
    name: str | None,
) -> tuple[Array, tuple[Any, ...]]:
    h = glu_forward((gate_up,), activation=activation, tail=forward_tail([projection]))
    y, t = forward(h, [projection], dropout_key, scaling, dropout_rate)
    if name is not None:
        y, t = checkpoint_name(y, name), None if t is None else checkpoint_name(t, f"{name}_low_rank")
    return y, (gate_up, t, projection, dropout_key)


def _bwd(
    activation: str, scaling: float, dropout_rate: float, name: str | None, residuals: tuple[Any, ...], dy: Array
) -> tuple[Any, ...]:
    gate_up, t, projection, dropout_key = residuals
    group = [projection]
    if t is None:
        dh = base_product_transposed(dy, group)
        _, (d_gate_up,) = glu_backward(dh, (gate_up,), activation=activation, with_h=False)
        return d_gate_up, projection.gradient(None, None), None
    # Where layers are recomputed t is made of gate_up once more, over which its gradient is written below: were it made
    # afterwards, gate_up would be copied.
    gate_up, t = lax.optimization_barrier((gate_up, t))
    a, dt = stacked_a(group, t.shape[1], scaling, dy.dtype), low_rank_gradient(dy, t, group)
    if dropout_rate == 0.0 or dropout_key is None:
        dh = base_product_transposed(dy, group, (dt, a.T))
        h, (d_gate_up,) = glu_backward(dh, (gate_up,), activation=activation)
        assert h is not None
        d_a = outer(dt, h)
    else:
        h = glu_forward((gate_up,), activation=activation)
        through_adapter, d_a = low_rank_backward(dt, h, a, group, dropout_key, dropout_rate)
        dh = base_product_transposed(dy, group) + through_adapter
        _, (d_gate_up,) = glu_backward(dh, (gate_up,), activation=activation, with_h=False)
    (gradient,) = split_gradients(group, scaling * d_a, outer_transposed(t, dy))
    return d_gate_up, gradient, None


glu_linear_fp8.defvjp(_fwd, _bwd)
