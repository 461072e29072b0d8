"""Products with the head, dense or packed.

A packed head is decoded some rows at a time, forward and backward, and never whole: decoded it would be four times the
size that packing left it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels.nf4 import NF4Tensor, dequantize
from pallas_kernels.nf4.reference import decode_scales

# Bytes of the rows that are decoded at a time.
DECODED_BYTES = 64 * 2**20


def with_plain_scales(head: Array | NF4Tensor) -> Array | NF4Tensor:
    """The head with double quantisation undone, so that it can be cut between any two rows.

    Raises:
        NotImplementedError: a packed head whose rows are not whole blocks.
    """
    if not isinstance(head, NF4Tensor):
        return head
    if head.shape[1] % head.block_size:
        raise NotImplementedError(
            f"linear_cross_entropy: the packed head {head.shape} has rows that are not whole blocks of "
            f"{head.block_size}; pass it decoded"
        )
    return dataclasses.replace(head, absmax=decode_scales(head), nested_absmax=None, nested_offset=None)


def logits(h: Float[Array, "B C D"], head: Array | NF4Tensor) -> Float[Array, "B C V"]:
    """float32 h W^T; a packed head has plain scales."""
    if not isinstance(head, NF4Tensor):
        return _dot(h, head, 1)

    def add(index: Array, out: Array) -> Array:
        start, rows = _rows(head, index, h.dtype)
        return lax.dynamic_update_slice_in_dim(out, _dot(h, rows, 1), start, axis=2)

    return lax.fori_loop(0, _pieces(head, h.dtype), add, jnp.zeros((*h.shape[:2], head.shape[0]), jnp.float32))


def d_hidden(d_logits: Float[Array, "B C V"], head: Array | NF4Tensor) -> Float[Array, "B C D"]:
    """float32 dL W; a packed head has plain scales."""
    if not isinstance(head, NF4Tensor):
        return _dot(d_logits, head, 0)

    def add(index: Array, sums: Array) -> Array:
        start, rows = _rows(head, index, d_logits.dtype)
        some = lax.dynamic_slice_in_dim(d_logits, start, rows.shape[0], axis=2)
        # The last rows may overlap those before.
        is_new = start + jnp.arange(rows.shape[0]) >= index * rows.shape[0]
        return sums + _dot(jnp.where(is_new, some, 0), rows, 0)

    zeros = jnp.zeros((*d_logits.shape[:2], head.shape[1]), jnp.float32)
    return lax.fori_loop(0, _pieces(head, d_logits.dtype), add, zeros)


def _dot(a: Array, head: Array, axis: int) -> Array:
    return lax.dot_general(a, head, (((2,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _piece(head: NF4Tensor, dtype: jnp.dtype) -> int:
    """Rows that are decoded at a time."""
    return min(head.shape[0], max(1, DECODED_BYTES // (head.shape[1] * dtype.itemsize)))


def _pieces(head: NF4Tensor, dtype: jnp.dtype) -> int:
    return -(-head.shape[0] // _piece(head, dtype))


def _rows(head: NF4Tensor, index: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The first row of a piece, and the piece decoded: all pieces have the same size, the last one ends the head."""
    count, (rows, columns) = _piece(head, dtype), head.shape
    start = jnp.minimum(index * count, rows - count)

    def cut(array: Array, elements: int) -> Array:
        per_row = columns // elements
        return lax.dynamic_slice_in_dim(array.reshape(rows, per_row), start, count).reshape(-1)

    codes, absmax = cut(jnp.asarray(head.codes), 2), cut(jnp.asarray(head.absmax), head.block_size)
    return start, jnp.asarray(
        dequantize(dataclasses.replace(head, codes=codes, absmax=absmax, shape=(count, columns)), dtype)
    )
