"""Products with the head: dense, in 8 bits, or packed as NF4.

A head in 8 or 4 bits is decoded some rows at a time, forward and backward, and never whole: decoded it would be two or
four times the size that it has.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int8

from pallas_kernels.nf4 import NF4Tensor, dequantize
from pallas_kernels.nf4.reference import decode_scales

# Bytes of the rows that are decoded at a time.
DECODED_BYTES = 64 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Head:
    """values int8 [V, D] and scales float32 [V]: each row of the head is its values times its scale."""

    values: Int8[Array, "V D"]
    scales: Float32[Array, " V"]

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        vocabulary, width = self.values.shape
        return vocabulary, width


Head: TypeAlias = Array | NF4Tensor | Int8Head


def quantize_head(head: Float[Array, "V D"]) -> Int8Head:
    """The head in 8 bits: 127 steps to the largest absolute value of each row, which keeps about 1 % of error where NF4
    keeps 9."""
    head = head.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(head), axis=1), jnp.finfo(jnp.float32).tiny) / 127
    return Int8Head(jnp.round(head / scales[:, None]).astype(jnp.int8), scales)


def decoded_head(head: Head, dtype: jnp.dtype) -> Float[Array, "V D"]:
    """The whole head in `dtype`, each value rounded once: what the definition multiplies by."""
    if isinstance(head, Int8Head):
        return (head.values.astype(jnp.float32) * head.scales[:, None]).astype(dtype)
    return jnp.asarray(dequantize(head, dtype)) if isinstance(head, NF4Tensor) else head.astype(dtype)


def prepared(head: Head, dtype: jnp.dtype) -> Head:
    """A dense head in `dtype`; one packed as NF4 with double quantisation undone, so that any rows can be cut out.

    Raises:
        NotImplementedError: a packed head whose rows are not whole blocks.
    """
    if isinstance(head, Int8Head):
        return head
    if not isinstance(head, NF4Tensor):
        return jnp.asarray(head, dtype)
    if head.shape[1] % head.block_size:
        raise NotImplementedError(
            f"linear_cross_entropy: the packed head {head.shape} has rows that are not whole blocks of "
            f"{head.block_size}; pass it decoded"
        )
    return dataclasses.replace(head, absmax=decode_scales(head), nested_absmax=None, nested_offset=None)


def logits(h: Float[Array, "B C D"], head: Head) -> Float[Array, "B C V"]:
    """float32 h W^T of a head that is `prepared`."""
    if isinstance(head, Array):
        return _dot(h, head, 1)

    def add(index: Array, out: Array) -> Array:
        start, rows = _rows(head, index, h.dtype)
        return lax.dynamic_update_slice_in_dim(out, _dot(h, rows, 1), start, axis=2)

    return lax.fori_loop(0, _pieces(head, h.dtype), add, jnp.zeros((*h.shape[:2], head.shape[0]), jnp.float32))


def d_hidden(d_logits: Float[Array, "B C V"], head: Head) -> Float[Array, "B C D"]:
    """float32 dL W of a head that is `prepared`."""
    if isinstance(head, Array):
        return _dot(d_logits, head, 0)

    def add(index: Array, sums: Array) -> Array:
        start, rows = _rows(head, index, d_logits.dtype)
        some = lax.dynamic_slice_in_dim(d_logits, start, rows.shape[0], axis=2)
        # The last rows may overlap those before.
        is_new = start + jnp.arange(rows.shape[0]) >= index * rows.shape[0]
        return sums + _dot(jnp.where(is_new, some, 0), rows, 0)

    zeros = jnp.zeros((*d_logits.shape[:2], head.shape[1]), jnp.float32)
    return lax.fori_loop(0, _pieces(head, d_logits.dtype), add, zeros)


def d_head(d_logits: Float[Array, "B C V"], h: Float[Array, "B C D"]) -> Float[Array, "V D"]:
    """float32 dL^T h."""
    return lax.dot_general(d_logits, h, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)


def _dot(a: Array, head: Array, axis: int) -> Array:
    return lax.dot_general(a, head, (((2,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _piece(head: NF4Tensor | Int8Head, dtype: jnp.dtype) -> int:
    """Rows that are decoded at a time."""
    return min(head.shape[0], max(1, DECODED_BYTES // (head.shape[1] * dtype.itemsize)))


def _pieces(head: NF4Tensor | Int8Head, dtype: jnp.dtype) -> int:
    return -(-head.shape[0] // _piece(head, dtype))


def _rows(head: NF4Tensor | Int8Head, index: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The first row of a piece, and the piece decoded: all pieces have the same size, the last one ends the head."""
    count, (rows, columns) = _piece(head, dtype), head.shape
    start = jnp.minimum(index * count, rows - count)
    if isinstance(head, Int8Head):
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), head)
        return start, decoded_head(part, dtype)

    def cut(array: Array, elements: int) -> Array:
        per_row = columns // elements
        return lax.dynamic_slice_in_dim(array.reshape(rows, per_row), start, count).reshape(-1)

    codes, absmax = cut(jnp.asarray(head.codes), 2), cut(jnp.asarray(head.absmax), head.block_size)
    return start, decoded_head(dataclasses.replace(head, codes=codes, absmax=absmax, shape=(count, columns)), dtype)
