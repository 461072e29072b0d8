"""Head and cross-entropy through XLA, a chunk of tokens at a time, with the gradient made in the forward pass.

Why it exists: logits of a whole batch are the largest array of a step (8,192 tokens x 128,256 x 4 bytes = 4 GB), and
the gradient with respect to them is as large. Here only one chunk's logits live at a time, and since the loss is a
scalar, the gradients with respect to the hidden states, and to a head that is trained, are made while the chunk's
softmax is at hand; the backward pass only scales them. Chunks take their tokens where these lie, those without weight
never, which saves most of the head's work where only responses are learnt.
Numerics: logits, their scale and soft-cap, and softmax in float32; the gradient with respect to the logits is formed in
float32, then rounded to hidden's dtype for the products; that of the head is summed in float32.
With `Vocabulary` each device holds some rows of the head. Where its devices have different tokens, a chunk's tokens
visit all of them, so that no device holds the hidden states of another beyond a chunk; maxima, sums and the targets'
logits are put together, and the parts of the gradient are added up, rounded to hidden's dtype before.
A head in 4 or 8 bits is decoded twice for each chunk, some rows at a time.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cross_entropy import head as head_products
from pallas_kernels.cross_entropy.head import Head
from pallas_kernels.cross_entropy.triton import softmax_triton


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How the rows of a head lie on the devices of a `shard_map`, in order along `axes`.

    axes: names of mesh axes, the outermost first. tokens: the one of them along which the tokens differ, or None.
    """

    axes: tuple[str, ...]
    tokens: str | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """What is computed, and how. cap: soft-cap of the logits, or None. scale: factor on them. chunk: tokens of one row
    at a time. trains_head: whether the head has a gradient. vocabulary: see `Vocabulary`, or None. implementation: of
    the softmax, "xla" or "triton"; the products are XLA's."""

    chunk: int
    cap: float | None = None
    scale: float = 1.0
    trains_head: bool = False
    vocabulary: Vocabulary | None = None
    implementation: str = "xla"


def _chunk_loss(h: Array, head: Head, target: Array, weight: Array, form: Form) -> tuple[Array, Array]:
    """Weighted losses of one chunk, float32 [B, c], and their gradient with respect to the head's products, [B, c, V],
    in float32 or in h's dtype, of this device's part of the vocabulary."""
    logits, cap, vocabulary = head_products.logits(h, head), form.cap, form.vocabulary
    if form.implementation == "triton":
        losses, d_logits = softmax_triton(
            logits.reshape(-1, logits.shape[-1]), target.ravel(), weight.ravel(), h.dtype, form.scale, cap
        )
        return losses.reshape(target.shape), d_logits.reshape(logits.shape)
    if form.scale != 1.0:
        logits = form.scale * logits
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
    if form.scale != 1.0:
        d_logits *= form.scale
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


class _Gradients(NamedTuple):
    """With respect to hidden [B, T, D], in its dtype; and to the head [V, D], float32, where it is trained."""

    hidden: Array
    head: Array | None


def _loss_and_gradients(
    hidden: Array, head: Head, targets: Array, weights: Array, form: Form, with_gradient: bool
) -> tuple[Array, _Gradients | None]:
    """The loss, and the gradients where asked for."""
    (count, length), chunk, vocabulary = targets.shape, form.chunk, form.vocabulary
    head, operands = head_products.prepared(head, hidden.dtype), [jnp.asarray(x) for x in (hidden, targets, weights)]
    # Positions of a row, the learnt ones first; behind the last there are some that no row has.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    beyond = jnp.arange(length, length + -length % chunk, dtype=order.dtype)
    order = jnp.concatenate([order, jnp.broadcast_to(beyond, (count, beyond.size))], axis=1)
    most_learnt = jnp.max(jnp.sum(weights != 0, axis=1))
    if vocabulary is not None and vocabulary.tokens is not None:
        most_learnt = lax.pmax(most_learnt, vocabulary.tokens)

    def one_chunk(index: Array, carry: tuple[Array, _Gradients | None]) -> tuple[Array, _Gradients | None]:
        total, gradients = carry
        at = jnp.arange(count)[:, None], lax.dynamic_slice_in_dim(order, index * chunk, chunk, axis=1)
        own = [x.at[at].get(mode="fill", fill_value=0, unique_indices=True) for x in operands]
        h, target, weight = (_visiting(x, vocabulary) for x in own)
        losses, d_logits = _chunk_loss(h, head, target, weight, form)
        if gradients is not None:
            d_logits = d_logits.astype(h.dtype)
            d_h = _returned(head_products.d_hidden(d_logits, head).astype(h.dtype), vocabulary)
            d_hidden = gradients.hidden.at[at].set(d_h, mode="drop", unique_indices=True)
            d_head = None if gradients.head is None else gradients.head + head_products.d_head(d_logits, h)
            gradients = _Gradients(d_hidden, d_head)
        if vocabulary is not None and vocabulary.tokens is not None:
            losses = lax.dynamic_slice_in_dim(losses, lax.axis_index(vocabulary.tokens) * count, count)
        return total + jnp.sum(losses), gradients

    none_yet = None
    if with_gradient:
        none_yet = _Gradients(jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32) if form.trains_head else None)
    return lax.fori_loop(0, -(-most_learnt // chunk), one_chunk, (jnp.float32(0.0), none_yet))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy_xla(hidden: Array, head: Head, targets: Array, weights: Array, form: Form) -> Array:
    """See `pallas_kernels.cross_entropy.api.linear_cross_entropy`."""
    return _loss_and_gradients(hidden, head, targets, weights, form, with_gradient=False)[0]


def _fwd(hidden: Array, head: Head, targets: Array, weights: Array, form: Form) -> tuple[Array, tuple[Array, Any]]:
    total, gradients = _loss_and_gradients(hidden, head, targets, weights, form, with_gradient=True)
    assert gradients is not None
    d_head = gradients.head
    if d_head is not None:
        assert isinstance(head, Array), "a head in 8 or 4 bits is not trained"
        d_head = d_head.astype(head.dtype)
    return total, (gradients.hidden, d_head)


def _bwd(form: Form, gradients: tuple[Array, Any], g: Array) -> tuple[Array | None, ...]:
    d_hidden, d_head = jax.tree.map(lambda x: (g * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return d_hidden, d_head, None, None


linear_cross_entropy_xla.defvjp(_fwd, _bwd)
