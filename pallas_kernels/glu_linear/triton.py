"""The gated unit and the linear layer behind it as one differentiable block, through Triton and cuBLAS.

Why it exists: the unit writes the operand that already has room for the adapter's columns, and its backward pass works
in place. Saved for the backward pass: the unit's input and the low-rank product; the unit itself is made again while
its gradient is. Numerics: as lora_linear's extended form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.glu.triton import glu_backward_triton, glu_forward_triton
from pallas_kernels.lora_linear.projection import (
    Projection,
    block_b,
    dot,
    extended_columns,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
)
from pallas_kernels.lora_linear.triton import extended_product, narrow_backward


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def glu_linear_triton(
    gate_up: Array,
    projection: Projection,
    dropout_key: Array | None,
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
    dropout_key: Array | None,
    activation: str,
    scaling: float,
    dropout_rate: float,
    name: str | None,
) -> tuple[Array, tuple[Any, ...]]:
    padded = glu_forward_triton((gate_up,), activation, tail_width([projection], extended=True))
    y, t = extended_product(padded, [projection], dropout_key, scaling, dropout_rate)
    if name is not None:
        y, t = checkpoint_name(y, name), checkpoint_name(t, f"{name}_low_rank")
    return y, (gate_up, t, projection, dropout_key)


def _bwd(
    activation: str, scaling: float, dropout_rate: float, name: str | None, residuals: tuple[Any, ...], dy: Array
) -> tuple[Any, ...]:
    gate_up, t, projection, dropout_key = residuals
    group = [projection]
    if dropout_rate == 0.0 or dropout_key is None:
        dh, dt, d_b = narrow_backward(dy, t, group, scaling)
        h, (d_gate_up,) = glu_backward_triton(dh, (gate_up,), activation, True)
        assert h is not None
        d_a = outer(dt, h)
    else:
        tail = tail_width(group, extended=True)
        w, dy = extended_columns(group, tail, dy)
        a, dt = stacked_a(group, tail, scaling, dy.dtype), dot(dy, block_b(group, tail, dy.dtype), 0)
        h = glu_forward_triton((gate_up,), activation, 0)
        through_adapter, d_a = low_rank_backward(dt, h, a, group, dropout_key, dropout_rate)
        dh, d_b = dot(dy, w[:, :-tail], 0) + through_adapter, outer_transposed(t, dy)
        _, (d_gate_up,) = glu_backward_triton(dh, (gate_up,), activation, False)
    (gradient,) = split_gradients(group, scaling * d_a, d_b)
    return d_gate_up, gradient, None


glu_linear_triton.defvjp(_fwd, _bwd)
