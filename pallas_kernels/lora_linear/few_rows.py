"""Adapted linear layers for few rows, as in generation: packed weights are decoded inside of their products.

Why it exists: with few rows a product waits for its weight's bytes, and a decoded weight is eight times as many to move
(written, then read). A layer of a stack is read where it lies. For one row all layers that share it are one launch,
which adds the adapters to its sums before it rounds them; adapters that are layers of a stack are read there, too, and
then the low rank comes from `one_row`. Numerics and saved values of several rows: the separate
form's (see projection.py), with the base's product as `nf4_matmul` has it through Triton; the backward pass is that of
XLA. Refuses dense weights, and more rows than those products take.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._stack import StackLayer
from pallas_kernels.lora_linear.one_row import low_row
from pallas_kernels.lora_linear.projection import Group, exact_reason, low_rank, stacked_a, tail_width, with_bias
from pallas_kernels.lora_linear.xla import lora_linear_xla_backward
from pallas_kernels.nf4 import NF4Layer, NF4Tensor
from pallas_kernels.nf4_matmul.fused import fused_group
from pallas_kernels.nf4_matmul.triton import FUSED_ROWS, can_fuse
from pallas_kernels.nf4_matmul.triton import unsupported_reason as product_reason


def unsupported_reason(x: Any, group: Group) -> str | None:
    """Why these layers cannot take x [..., K] here, or None."""
    rows: Any = jax.ShapeDtypeStruct((x.size // x.shape[-1] if x.shape[-1] else 0, x.shape[-1]), x.dtype)
    if (reason := exact_reason(group)) is not None:
        return reason
    for p in group:
        if not isinstance(p.weight, NF4Tensor | NF4Layer):
            return "a dense weight has nothing to decode"
        if not can_fuse(rows, p.weight):
            return f"it takes up to {FUSED_ROWS} rows of 16 bits, or one of float32, not {rows.shape[0]} of {x.dtype}"
        if (reason := product_reason(x, p.weight)) is not None:
            return reason
    return None


def reads_stacks(x: Any, group: Group, dropout_key: Array | None) -> bool:
    """Whether x [..., K] is one row and adapters of this group are layers of stacks, to be read where they lie."""
    return dropout_key is None and x.size == x.shape[-1] and any(isinstance(p.lora_a, StackLayer) for p in group)


def row_product(x: Array, group: Group, low: Array | None) -> Array:
    """x [M, K] times the weights, and low, as in `fused_group`, times the lora_b: [M, sum of N]."""
    return with_bias(fused_group(x, [p.weight for p in group], [p.lora_b for p in group], low), group)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lora_linear_few_rows(
    x: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float
) -> Array:
    """[M, K] -> [M, sum of N]; see `pallas_kernels.lora_linear.api`."""
    if reads_stacks(x, group, dropout_key):
        return row_product(x, group, low_row(x, group, scaling))
    tail, no_dropout = tail_width(group, extended=False), dropout_key is None or dropout_rate == 0.0
    t = None
    if tail and x.shape[0] == 1 and no_dropout:
        # A sum that XLA makes where the layers' A lie; a product's operand would be put together first.
        a = jnp.concatenate([p.lora_a for p in group if p.rank]).astype(jnp.float32)
        t = scaling * jnp.sum(a * x.astype(jnp.float32), axis=1)[None]
    elif tail:
        t = low_rank(x, stacked_a(group, tail, scaling, x.dtype), group, dropout_key, dropout_rate)
    return row_product(x, group, t)


def _fwd(
    x: Array, group: Group, dropout_key: Array | None, scaling: float, dropout_rate: float
) -> tuple[Array, tuple[Any, ...]]:
    return lora_linear_few_rows(x, group, dropout_key, scaling, dropout_rate), (x, group, dropout_key)


lora_linear_few_rows.defvjp(_fwd, lora_linear_xla_backward)
