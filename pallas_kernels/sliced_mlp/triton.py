"""Norm, gate, up, gated unit and down as one differentiable block that goes through the MLP's width in slices, through
Triton and cuBLAS.

Why it exists: of 16-bit weights and of inner activations only one slice is there at a time, and yet all rows are in one
product and each weight is decoded once forward and once backward; pieces of rows decode all weights again for each
piece. Saved for the backward pass: the residual stream alone. Numerics: as norm_linear and glu_linear; the sums over
the slices are held in float32 and rounded once.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.glu.triton import glu_backward_triton, glu_forward_triton
from pallas_kernels.lora_linear.projection import (
    Group,
    Projection,
    block_b,
    dot,
    extended_columns,
    extended_rows,
    low_rank,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
)
from pallas_kernels.nf4.tensor import as_layer
from pallas_kernels.rms_norm.triton import rms_norm_backward_triton, rms_norm_forward_triton

Mlp = tuple[Projection, Projection, Projection]
# In bfloat16 an 8B step is 1.5 % faster (benchmarks/NOTES.md), and a sum rounded once a slice.
_SUMS = jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def sliced_mlp_triton(
    x: Array, scale: Array, mlp: Mlp, eps: float, unit_offset: bool, activation: str, scaling: float, slices: int
) -> tuple[Array, Array]:
    """[M, D] -> [M, D] and x; see `pallas_kernels.sliced_mlp.api`."""
    return _fwd(x, scale, mlp, eps, unit_offset, activation, scaling, slices)[0]


def _fwd(
    x: Array, scale: Array, mlp: Mlp, eps: float, unit_offset: bool, activation: str, scaling: float, slices: int
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    extended, _, _ = _normalised(x, scale, mlp[:2], eps, unit_offset, scaling)
    y: Any = None
    for gate_up, down in _cut(mlp, slices):
        # One after the other, or the compiler has all slices' weights decoded at once.
        extended, y = lax.optimization_barrier((extended, y))
        inner = dot(extended, _columns(gate_up, extended)[0], 1)
        h = glu_forward_triton((inner,), activation, tail_width(down, extended=True))
        t = low_rank(h, stacked_a(down, tail_width(down, extended=True), scaling, x.dtype), down, None, 0.0)
        h = lax.dynamic_update_slice(h, t, (0, h.shape[1] - t.shape[1]))
        y = _plus(y, h, _columns(down, h)[0], 1)
    return (y.astype(x.dtype), x), (x, scale, mlp)


def _bwd(
    eps: float,
    unit_offset: bool,
    activation: str,
    scaling: float,
    slices: int,
    residuals: tuple[Any, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Any, ...]:
    (x, scale, mlp), (dy, dx) = residuals, cotangents
    extended, t, inverse = _normalised(x, scale, mlp[:2], eps, unit_offset, scaling)
    tail, (down_tail, down) = t.shape[1], (tail_width(mlp[2:], extended=True), mlp[2:])
    dt_down = dot(dy, block_b(down, down_tail, dy.dtype), 0)
    dy_extended = jnp.concatenate([dy, dt_down], axis=1)
    sums: Any = None, None
    gradients: list[tuple[Array, Array]] = []
    for gate_up, down in _cut(mlp, slices):
        extended, dy_extended, sums, gradients = lax.optimization_barrier((extended, dy_extended, sums, gradients))
        dh_dt, t_down = sums
        w, operand = _columns(gate_up, extended)
        inner = dot(operand, w, 1)
        inner, dy_now = lax.optimization_barrier((inner, dy_extended))
        a = stacked_a(down, down_tail, scaling, dy.dtype)
        rows, dy_now = extended_rows(down[0], a, dy_now)
        h, (d_inner,) = glu_backward_triton(dot(dy_now, rows, 0), (inner,), activation, True)
        assert h is not None
        t_down = _plus(t_down, h, a, 1)
        d_b = outer_transposed(t, d_inner)
        gradients = [*gradients, (scaling * outer(dt_down, h), d_b)]
        sums = _plus(dh_dt, d_inner, w, 0), t_down
    dh_dt, t_down = sums
    dt, a = dh_dt[:, -tail:].astype(x.dtype), stacked_a(mlp[:2], tail, scaling, x.dtype)
    weight = scale.astype(jnp.float32) + (1.0 if unit_offset else 0.0)
    d_a = scaling * outer((dt * inverse[:, None]).astype(dt.dtype), x) * weight
    d_x = rms_norm_backward_triton(x, scale, inverse, dh_dt, dot(dt, a, 0), dx, unit_offset)
    half = gradients[0][1].shape[0] // 2
    d_b = jnp.concatenate([g[1][:half] for g in gradients] + [g[1][half:] for g in gradients])
    of_gate_up = split_gradients(mlp[:2], d_a, d_b)
    d_a_down = jnp.concatenate([g[0] for g in gradients], axis=1)
    of_down = split_gradients(mlp[2:], d_a_down, outer_transposed(t_down.astype(dy.dtype), dy))
    return d_x, None, (*of_gate_up, *of_down)


sliced_mlp_triton.defvjp(_fwd, _bwd)


def _normalised(
    x: Array, scale: Array, group: Group, eps: float, unit_offset: bool, scaling: float
) -> tuple[Array, Array, Array]:
    """The normalised rows with their low-rank product behind them, that product, and a number for each row."""
    tail = tail_width(group, extended=True)
    padded, inverse, _ = rms_norm_forward_triton(x, scale, None, eps, unit_offset, tail)
    t = low_rank(padded, stacked_a(group, tail, scaling, x.dtype), group, None, 0.0)
    return lax.dynamic_update_slice(padded, t, (0, x.shape[1])), t, inverse


def _columns(group: Group, x: Array) -> tuple[Array, Array]:
    return extended_columns(group, tail_width(group, extended=True), x)


def _plus(total: Array | None, x: Array, w: Array, axis: int) -> Array:
    """The sum and one more product."""
    product = lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=_SUMS)
    return product if total is None else total + product


def _cut(mlp: Mlp, slices: int) -> list[tuple[list[Projection], list[Projection]]]:
    """Gate and up, and down, of each slice of the MLP's width."""
    *gate_up, down = mlp
    (width, inner), outer_width = gate_up[0].weight.shape, down.weight.shape[0]
    size, cut = width // slices, []
    for first in range(0, width, size):
        here = slice(first, first + size)
        rows = [_part(p, (first, size, 0, inner), p.lora_a, p.lora_b[here]) for p in gate_up]
        cut.append((rows, [_part(down, (0, outer_width, first, size), down.lora_a[:, here], down.lora_b)]))
    return cut


def _part(p: Projection, part: tuple[int, int, int, int], lora_a: Array, lora_b: Array) -> Projection:
    weight = dataclasses.replace(as_layer(p.weight), part=part)
    return dataclasses.replace(p, weight=weight, lora_a=lora_a, lora_b=lora_b)
