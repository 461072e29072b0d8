"""Head and cross-entropy through XLA, a chunk of tokens at a time, with the gradient made in the forward pass.

Why it exists: logits of a whole batch are the largest array of a step (8,192 tokens x 128,256 x 4 bytes = 4 GB), and
the gradient with respect to them is as large. Here only one chunk's logits live at a time, and since the head is frozen
and the loss is a scalar, the gradient with respect to the hidden states is made while the chunk's softmax is at hand;
the backward pass only scales it. Tokens without weight are moved behind the others and never reach the head, which
saves most of its work where only responses are learnt.
Numerics: logits, their soft-cap and softmax in float32; the gradient with respect to the logits is formed in float32,
then rounded to hidden's dtype for the product.
With `Vocabulary` each device holds some rows of the head. Where its devices have different tokens, a chunk's tokens
visit all of them, so that no device holds the hidden states of another beyond a chunk; maxima, sums and the targets'
logits are put together, and the parts of the gradient are added up, rounded to hidden's dtype before.
A packed head is decoded twice for each chunk, some rows at a time.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cross_entropy import head as head_products
from pallas_kernels.nf4 import NF4Tensor


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How the rows of a head lie on the devices of a `shard_map`, in order along `axes`.

    axes: names of mesh axes, the outermost first. tokens: the one of them along which the tokens differ, or None.
    """

    axes: tuple[str, ...]
    tokens: str | None = None


def _chunk_loss(
    h: Array, head: Array | NF4Tensor, target: Array, weight: Array, cap: float | None, vocabulary: Vocabulary | None
) -> tuple[Array, Array]:
    """Weighted losses of one chunk, float32 [B, c], and their gradient with respect to the logits, float32 [B, c,
    V], of this device's part of the vocabulary."""
    logits = head_products.logits(h, head)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if vocabulary is None:
        log_sum_exp = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)
    else:
        target = target - lax.axis_index(vocabulary.axes) * head.shape[0]
        here = (target >= 0) & (target < head.shape[0])
        highest = lax.pmax(jnp.max(logits, axis=-1, keepdims=True), vocabulary.axes)
        sums = jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, jnp.where(here, target, 0)[..., None], axis=-1)
        both = jnp.concatenate([sums, jnp.where(here[..., None], picked, 0.0)], axis=-1)
        sums, picked = jnp.split(lax.psum(both, vocabulary.axes), 2, axis=-1)
        log_sum_exp = highest + jnp.log(sums)
    one_hot = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
    d_logits = weight[..., None] * (jnp.exp(logits - log_sum_exp) - one_hot)
    if cap is not None:
        d_logits *= 1 - jnp.square(logits / cap)
    return weight * (log_sum_exp - picked)[..., 0], d_logits


def _visiting(x: Array, vocabulary: Vocabulary | None) -> Array:
    """[B, ...] of all devices that share the vocabulary but not the tokens, below each other."""
    if vocabulary is None or vocabulary.tokens is None:
        return x
    return lax.all_gather(x, vocabulary.tokens, tiled=True)


def _returned(d_h: Array, vocabulary: Vocabulary | None) -> Array:
    """The sum of all parts of the gradient, of this device's tokens."""
    if vocabulary is None:
        return d_h
    if others := tuple(axis for axis in vocabulary.axes if axis != vocabulary.tokens):
        d_h = lax.psum(d_h, others)
    return d_h if vocabulary.tokens is None else lax.psum_scatter(d_h, vocabulary.tokens, tiled=True)


def _loss_and_gradient(
    hidden: Array,
    head: Array | NF4Tensor,
    targets: Array,
    weights: Array,
    chunk: int,
    cap: float | None,
    vocabulary: Vocabulary | None,
    with_gradient: bool,
) -> tuple[Array, Array | None]:
    """The loss, and the gradient [B, T, D] with respect to hidden where asked for. `chunk`: tokens of one row."""
    length, head = hidden.shape[1], head_products.with_plain_scales(head)
    learnt_first = jnp.argsort(weights == 0, axis=1, stable=True)
    most_learnt = jnp.max(jnp.sum(weights != 0, axis=1))
    if vocabulary is not None and vocabulary.tokens is not None:
        most_learnt = lax.pmax(most_learnt, vocabulary.tokens)

    def arranged(x: Array) -> Array:
        x = jnp.take_along_axis(x, learnt_first.reshape(*learnt_first.shape, *(1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))

    hidden_sorted, targets_sorted, weights_sorted = arranged(hidden), arranged(targets), arranged(weights)

    def one_chunk(index: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        total, gradient = carry
        h, target, weight = (
            lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1)
            for x in (hidden_sorted, targets_sorted, weights_sorted)
        )
        rows = h.shape[0]
        h, target, weight = (_visiting(x, vocabulary) for x in (h, target, weight))
        losses, d_logits = _chunk_loss(h, head, target, weight, cap, vocabulary)
        if gradient is not None:
            d_h = head_products.d_hidden(d_logits.astype(h.dtype), head)
            d_h = _returned(d_h.astype(h.dtype), vocabulary)
            gradient = lax.dynamic_update_slice_in_dim(gradient, d_h, index * chunk, axis=1)
        if vocabulary is not None and vocabulary.tokens is not None:
            losses = lax.dynamic_slice_in_dim(losses, lax.axis_index(vocabulary.tokens) * rows, rows)
        return total + jnp.sum(losses), gradient

    start = (jnp.float32(0.0), jnp.zeros_like(hidden_sorted) if with_gradient else None)
    total, gradient = lax.fori_loop(0, -(-most_learnt // chunk), one_chunk, start)
    if gradient is None:
        return total, None
    back = jnp.argsort(learnt_first, axis=1)
    return total, jnp.take_along_axis(gradient, back[..., None], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy_xla(
    hidden: Array,
    head: Array | NF4Tensor,
    targets: Array,
    weights: Array,
    chunk: int,
    cap: float | None,
    vocabulary: Vocabulary | None = None,
) -> Array:
    """See `pallas_kernels.cross_entropy.api.linear_cross_entropy`; here `chunk` counts tokens of one row."""
    return _loss_and_gradient(hidden, head, targets, weights, chunk, cap, vocabulary, with_gradient=False)[0]


def _fwd(
    hidden: Array,
    head: Array | NF4Tensor,
    targets: Array,
    weights: Array,
    chunk: int,
    cap: float | None,
    vocabulary: Vocabulary | None,
) -> tuple[Array, Array]:
    total, gradient = _loss_and_gradient(hidden, head, targets, weights, chunk, cap, vocabulary, with_gradient=True)
    assert gradient is not None
    return total, gradient


def _bwd(
    chunk: int, cap: float | None, vocabulary: Vocabulary | None, gradient: Array, g: Array
) -> tuple[Array | None, ...]:
    return (g * gradient.astype(jnp.float32)).astype(gradient.dtype), None, None, None


linear_cross_entropy_xla.defvjp(_fwd, _bwd)
