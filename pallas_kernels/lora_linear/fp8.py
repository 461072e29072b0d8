"""Adapted linear layers whose base products are in 8-bit floating point (e4m3), forward and backward.

Why it exists: on Hopper and newer an 8-bit product takes half of a bf16 one's time, and the base is most of a layer's
work; a base of 4 bits has an error of its own beside which e4m3's is small. Numerics: the base's products as
`fp8_matmul` has them; the adapters' products stay in x's dtype and are added to them in the pass that multiplies the
scales in. Saved for the backward pass: x and its low-rank product, neither of them in 8
bits. Members of a group that are not marked `fp8` are computed in x's dtype. Where all have an exact forward pass, that
is the extended form's.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8_matmul import fp8_product, fp8_product_transposed
from pallas_kernels.lora_linear.projection import (
    Group,
    appended_reason,
    block_b,
    dot,
    low_rank,
    low_rank_backward,
    outer,
    outer_transposed,
    split_gradients,
    stacked_a,
    tail_width,
    tied,
    with_bias,
)
from pallas_kernels.lora_linear.triton import extended_product
from pallas_kernels.nf4 import NF4Layer, NF4Tensor, dequantize

LowRank = tuple[Array, Array]


def base_product(x: Array, group: Group, low_rank: LowRank | None = None) -> Array:
    """[M, K] -> [M, sum of N]: the frozen layers beside each other, without bias; plus t b^T of low_rank = (t, b)."""
    weights, x = tied(group, x)
    parts, row = [], 0
    for fp8, run in _runs([p.fp8 and not p.exact_forward for p in group], weights):
        end = row + sum(w.shape[0] for w in run)
        added = None if low_rank is None else (low_rank[0], low_rank[1][row:end])
        parts.append(fp8_product(x, run, low_rank=added) if fp8 else _plus(dot(x, _matrix(run, x.dtype), 1), added))
        row = end
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def base_product_transposed(dy: Array, group: Group, low_rank: LowRank | None = None) -> Array:
    """[M, sum of N] -> [M, K]: the gradient of `base_product`; plus t b^T."""
    weights, dy = tied(group, dy)
    total, column = None, 0
    for fp8, run in _runs([p.fp8 for p in group], weights):
        end = column + sum(w.shape[0] for w in run)
        part, added = dy[:, column:end], low_rank if column == 0 else None
        if fp8:
            dx = fp8_product_transposed(part, run, low_rank=added)
        else:
            dx = _plus(dot(part, _matrix(run, dy.dtype), 0), added)
        total, column = dx if total is None else total + dx, end
    assert total is not None
    return total


def forward_tail(group: Group) -> int:
    """Columns of zeros that `forward` takes behind x, for the adapters."""
    extended = all(p.exact_forward for p in group) and appended_reason(group) is None
    return tail_width(group, extended=True) if extended else 0


def forward(
    x: Array, group: Group, dropout_key: Any, scaling: float, dropout_rate: float
) -> tuple[Array, Array | None]:
    """The layers on x [M, K + forward_tail]: [M, sum of N]; and the low-rank product, None without adapters."""
    if forward_tail(group):
        return extended_product(x, group, dropout_key, scaling, dropout_rate)
    tail = tail_width(group, extended=False)
    if tail == 0:
        return with_bias(base_product(x, group), group), None
    t = low_rank(x, stacked_a(group, tail, scaling, x.dtype), group, dropout_key, dropout_rate)
    return with_bias(base_product(x, group, (t, block_b(group, tail, x.dtype))), group), t


def low_rank_gradient(dy: Array, t: Array, group: Group) -> Array:
    """dY B, of the low-rank product's shape [M, tail]."""
    return dot(dy, block_b(group, t.shape[1], dy.dtype), 0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lora_linear_fp8(x: Array, group: Group, dropout_key: Any, scaling: float, dropout_rate: float) -> Array:
    """[M, K] -> [M, sum of N]; see `pallas_kernels.lora_linear.api`."""
    return _fwd(x, group, dropout_key, scaling, dropout_rate)[0]


def _fwd(
    x: Array, group: Group, dropout_key: Any, scaling: float, dropout_rate: float
) -> tuple[Array, tuple[Any, ...]]:
    tail = forward_tail(group)
    padded = jnp.pad(x, ((0, 0), (0, tail))) if tail else x
    y, t = forward(padded, group, dropout_key, scaling, dropout_rate)
    return y, (x if t is not None else None, t, group, dropout_key)


def _bwd(scaling: float, dropout_rate: float, residuals: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    x, t, group, dropout_key = residuals
    if t is None:
        return base_product_transposed(dy, group), split_gradients(group, None, None), None
    a, dt = stacked_a(group, t.shape[1], scaling, dy.dtype), low_rank_gradient(dy, t, group)
    if dropout_rate == 0.0 or dropout_key is None:
        dx, d_a = base_product_transposed(dy, group, (dt, a.T)), outer(dt, x)
    else:
        through_adapter, d_a = low_rank_backward(dt, x, a, group, dropout_key, dropout_rate)
        dx = base_product_transposed(dy, group) + through_adapter
    return dx, split_gradients(group, scaling * d_a, outer_transposed(t, dy)), None


lora_linear_fp8.defvjp(_fwd, _bwd)


def _runs(in_fp8: list[bool], weights: list[Any]) -> list[tuple[bool, list[Any]]]:
    """Neighbours that are computed alike."""
    alike = itertools.groupby(zip(in_fp8, weights, strict=True), key=lambda pair: pair[0])
    return [(fp8, [w for _, w in run]) for fp8, run in alike]


def _plus(y: Array, low_rank: LowRank | None) -> Array:
    return y if low_rank is None else y + dot(*low_rank, 1)


def _matrix(weights: list[Any], dtype: Any) -> Array:
    alone = [w.picked() if isinstance(w, NF4Layer) else w for w in weights]
    matrices = [jnp.asarray(dequantize(w, dtype)) if isinstance(w, NF4Tensor) else w.astype(dtype) for w in alone]
    return matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices)
