"""Head and cross-entropy through XLA, a chunk of tokens at a time, with the gradient made in the forward pass.

Why it exists: logits of a whole batch are the largest array of a step (8,192 tokens x 128,256 x 4 bytes = 4 GB), and
the gradient with respect to them is as large. Here only one chunk's logits live at a time, and since the head is frozen
and the loss is a scalar, the gradient with respect to the hidden states is made while the chunk's softmax is at hand;
the backward pass only scales it. Numerics: logits and softmax in float32; softmax minus one-hot is formed in float32,
then rounded to hidden's dtype for the product.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def _chunks(x: Array, size: int) -> Array:
    """[B, T, ...] -> [ceil(T / size), B, size, ...], padded with zeros."""
    b, t = x.shape[:2]
    count = -(-t // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - t), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(b, count, size, *x.shape[2:]), 1, 0)


def _scan(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, with_gradient: bool
) -> tuple[Array, Array | None]:
    """The loss, and the gradient [B, T, D] with respect to hidden where asked for. `chunk`: tokens of one row."""

    def one_chunk(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
        h, target, weight = inputs
        logits = lax.dot_general(h, head, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        log_sum_exp = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)
        total = total + jnp.sum(weight * (log_sum_exp - picked)[..., 0])
        if not with_gradient:
            return total, None
        one_hot = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
        d_logits = (weight[..., None] * (jnp.exp(logits - log_sum_exp) - one_hot)).astype(h.dtype)
        d_hidden = lax.dot_general(d_logits, head, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total, d_hidden.astype(h.dtype)

    xs = (_chunks(hidden, chunk), _chunks(targets, chunk), _chunks(weights, chunk))
    total, d_hidden = lax.scan(one_chunk, jnp.float32(0.0), xs)
    if d_hidden is None:
        return total, None
    b, t, d = hidden.shape
    return total, jnp.moveaxis(d_hidden, 0, 1).reshape(b, -1, d)[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy_xla(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> Array:
    """See `pallas_kernels.cross_entropy.api.linear_cross_entropy`."""
    return _scan(hidden, head, targets, weights, chunk, with_gradient=False)[0]


def _fwd(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array]:
    total, d_hidden = _scan(hidden, head, targets, weights, chunk, with_gradient=True)
    assert d_hidden is not None
    return total, d_hidden


def _bwd(chunk: int, d_hidden: Array, g: Array) -> tuple[Array | None, ...]:
    return (g * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype), None, None, None


linear_cross_entropy_xla.defvjp(_fwd, _bwd)
