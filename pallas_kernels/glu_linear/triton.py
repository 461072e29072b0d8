"""The gated unit and the linear layer behind it as one differentiable block, through Triton and cuBLAS.

Why it exists: the unit writes the operand that already has room for the adapter's columns, and its backward pass works
in place. Saved for the backward pass: the unit's input and, with `keep_low_rank`, the low-rank product; the unit itself
is made again while its gradient is. Where a layer is computed again anyway, not keeping the product is what saves: to
make it once more would take another unit, which still needs the input that the backward pass writes over, so that XLA
copies it. Numerics: as lora_linear's extended form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.glu.triton import glu_backward_triton, glu_forward_triton
from pallas_kernels.lora_linear.projection import (
    Projection,
    block_b,
    dot,
    extended_columns,
    low_rank,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
)
from pallas_kernels.lora_linear.triton import extended_product, narrow_backward


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def glu_linear_triton(
    gate_up: Array,
    projection: Projection,
    dropout_key: Array | None,
    activation: str,
    scaling: float,
    dropout_rate: float,
    name: str | None,
    keep_low_rank: bool,
) -> Array:
    """[M, 2F] -> [M, N]; see `pallas_kernels.glu_linear.api`."""
    return _fwd(gate_up, projection, dropout_key, activation, scaling, dropout_rate, name, keep_low_rank)[0]


def _fwd(
    gate_up: Array,
    projection: Projection,
    dropout_key: Array | None,
    activation: str,
    scaling: float,
    dropout_rate: float,
    name: str | None,
    keep_low_rank: bool,
) -> tuple[Array, tuple[Any, ...]]:
    padded = glu_forward_triton((gate_up,), activation, tail_width([projection], extended=True))
    y, t = extended_product(padded, [projection], dropout_key, scaling, dropout_rate)
    if name is not None:
        y, t = checkpoint_name(y, name), checkpoint_name(t, f"{name}_low_rank")
    return y, (gate_up, t if keep_low_rank else None, projection, dropout_key)


def _bwd(
    activation: str,
    scaling: float,
    dropout_rate: float,
    name: str | None,
    keep_low_rank: bool,
    residuals: tuple[Any, ...],
    dy: Array,
) -> tuple[Any, ...]:
    gate_up, t, projection, dropout_key = residuals
    group = [projection]
    if t is None:
        # Or XLA may decode this weight while gate's and up's is still there.
        gate_up, dy = lax.optimization_barrier((gate_up, dy))
    tail = tail_width(group, extended=True)
    a = stacked_a(group, tail, scaling, dy.dtype)
    if dropout_rate == 0.0 or dropout_key is None:
        dh, dt = narrow_backward(dy, a, group)
        h, (d_gate_up,) = glu_backward_triton(dh, (gate_up,), activation, True)
        assert h is not None
        d_a = outer(dt, h)
    else:
        w, extended = extended_columns(group, tail, dy)
        dt = dot(dy, block_b(group, tail, dy.dtype), 0)
        h = glu_forward_triton((gate_up,), activation, 0)
        through_adapter, d_a = low_rank_backward(dt, h, a, group, dropout_key, dropout_rate)
        dh = dot(extended, w[:, :-tail], 0) + through_adapter
        _, (d_gate_up,) = glu_backward_triton(dh, (gate_up,), activation, False)
    if t is None:
        t = low_rank(h, a, group, dropout_key, dropout_rate)
    d_b = outer_transposed(t, dy)
    (gradient,) = split_gradients(group, scaling * d_a, d_b)
    return d_gate_up, gradient, None


glu_linear_triton.defvjp(_fwd, _bwd)
