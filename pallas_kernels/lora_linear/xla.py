"""The adapted linear layer through XLA: base matmul and adapter as separate products.

Why it exists: it runs everywhere and is what the kernels are measured against. Numerics: products accumulate in
float32; the base's is rounded to x's dtype, and the adapter's is added to it, so that a GPU can do the addition while
it writes the product. Saved for the backward pass: x, once. A 4-bit weight is decoded again for dX, so no 16-bit weight
outlives a product. The base has no gradient and no gradient of a weight's size is ever made.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.nf4 import NF4Tensor, dequantize

Residuals = tuple[Array, Any, Array | None, Array | None, Array | None]


def _dot(x: Array, w: Array, w_axis: int) -> Array:
    """Contract x's last axis with axis `w_axis` of the matrix w, in x's dtype."""
    return lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (w_axis,)), ((), ())))


def _outer(a: Array, b: Array) -> Array:
    """Sum over all leading axes of a^T b, in float32: [.., I], [.., J] -> [I, J]."""
    axes = tuple(range(a.ndim - 1))
    return lax.dot_general(a, b, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)


def _decoded(weight: Array | NF4Tensor, x: Array) -> tuple[Array, Array]:
    """The weight in x's dtype, and x."""
    if not isinstance(weight, NF4Tensor):
        return weight.astype(x.dtype), x
    # The tie to x: without it XLA may decode the weights of every layer before the first one runs.
    packed, x = lax.optimization_barrier((weight, x))
    return jnp.asarray(dequantize(packed, x.dtype)), x


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def lora_linear_xla(
    x: Array,
    weight: Array | NF4Tensor,
    bias: Array | None,
    lora_a: Array | None,
    lora_b: Array | None,
    dropout_key: Array | None,
    scaling: float,
    dropout_rate: float,
) -> Array:
    """See `pallas_kernels.lora_linear.api.lora_linear`."""
    w, x = _decoded(weight, x)
    y = _dot(x, w, 1)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    if lora_a is not None and lora_b is not None:
        y = y + _dot(scaling * _dot(_dropout(x, dropout_rate, dropout_key), lora_a, 1), lora_b, 1)
    return y


def _fwd(
    x: Array,
    weight: Array | NF4Tensor,
    bias: Array | None,
    lora_a: Array | None,
    lora_b: Array | None,
    dropout_key: Array | None,
    scaling: float,
    dropout_rate: float,
) -> tuple[Array, Residuals]:
    y = lora_linear_xla(x, weight, bias, lora_a, lora_b, dropout_key, scaling, dropout_rate)
    return y, (x, weight, lora_a, lora_b, dropout_key)


def _bwd(scaling: float, dropout_rate: float, residuals: Residuals, dy: Array) -> tuple[Array | None, ...]:
    x, weight, lora_a, lora_b, dropout_key = residuals
    w, dy = _decoded(weight, dy)
    dx = _dot(dy, w, 0)
    if lora_a is None or lora_b is None:
        return dx, None, None, None, None, None
    dropped = _dropout(x, dropout_rate, dropout_key)
    low_rank = _dot(dropped, lora_a, 1)
    d_low_rank = scaling * _dot(dy, lora_b, 0)
    d_lora_a = _outer(d_low_rank, dropped).astype(lora_a.dtype)
    if x.dtype == jnp.bfloat16:
        # XLA's CPU code runs no bf16 product that is written transposed (jax 0.10 and 0.11).
        d_lora_b = (scaling * _outer(dy, low_rank)).astype(lora_b.dtype)
    else:
        # The narrow operand first: XLA transposes the first one, and on a CPU that would be dY, the widest array here.
        d_lora_b = (scaling * _outer(low_rank, dy)).T.astype(lora_b.dtype)
    # Dropout's backward is dropout itself with the same key.
    dx = dx + _dropout(_dot(d_low_rank, lora_a, 0), dropout_rate, dropout_key)
    return dx, None, None, d_lora_a, d_lora_b, None


lora_linear_xla.defvjp(_fwd, _bwd)
