"""The packed 4-bit weight: bitsandbytes' NF4 bytes as a JAX pytree.

Format (QLoRA, arXiv:2305.14314, section 3; byte layout as in bitsandbytes' checkpoints): the weight is read row-major
over [out, in] and cut into blocks of 64 elements. Element 2i of the flattened weight is the high nibble of byte i. Each
block has one scale, its absolute maximum; with double quantisation the scales are themselves 8-bit, in blocks of 256,
about their mean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

ArrayLike = jax.Array | np.ndarray | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Tensor:
    """A weight [out, in], or a stack of them, packed as NF4.

    Arrays are flat along the weight, so that whole rows can be cut off without decoding; leading axes (layers) may
    stand before. Leaves may be JAX arrays, NumPy arrays or `ShapeDtypeStruct`s. With out * in = P and
    blocks = ceil(P / block_size):

    codes: uint8 [*stack, ceil(P / 2)], two 4-bit codes a byte, high nibble first.
    absmax: float32 [*stack, blocks], or with double quantisation uint8 codes of the same shape.
    nested_absmax: float32 [*stack, ceil(blocks / nested_block_size)], or None without double quantisation.
    nested_offset: float32 [*stack], the mean that was taken off the scales, or None.
    shape: (out, in) of one weight.
    dtype: the dtype that decoding rounds to, "bfloat16", "float16" or "float32": what the weight was before packing.
    block_size, nested_block_size: elements per scale, scales per nested scale.
    nested_dtype: the dtype that decoded scales are rounded to before use (bitsandbytes keeps what the checkpoint says).
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})
    block_size: int = dataclasses.field(default=64, metadata={"static": True})
    nested_block_size: int = dataclasses.field(default=256, metadata={"static": True})
    nested_dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def is_nested(self) -> bool:
        """Whether the scales are 8-bit themselves (double quantisation)."""
        return self.nested_absmax is not None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes: () for one weight, (layers,) for a stack."""
        return tuple(self.codes.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight occupies: codes and scales."""
        leaves = jax.tree.leaves(self)
        return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Layer:
    """One weight of a stack, or a part of it, without a copy: kernels read the stack at `index`, an int32 scalar.

    part: (first row, rows, first column, columns), whole blocks of columns; None for all of the weight.
    """

    stack: NF4Tensor
    index: Any
    part: tuple[int, int, int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.stack.shape if self.part is None else (self.part[1], self.part[3])

    @property
    def place(self) -> tuple[int, int, int, int]:
        """`part`, or that of all of the weight."""
        return (0, self.stack.shape[0], 0, self.stack.shape[1]) if self.part is None else self.part

    def picked(self) -> NF4Tensor:
        """The whole weight on its own. XLA fuses the choice into the decoding; before a kernel it is a copy."""
        assert self.part is None, "the bytes of a part do not follow each other"
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, keepdims=False), self.stack)


def as_layer(weight: NF4Tensor | NF4Layer) -> NF4Layer:
    """A weight as Triton's kernels read it: of a stack, at an index.

    Of stacks of 2 to 4 GiB of codes, as of a 70B model's square linears, one weight is copied out and read there:
    Pallas addresses arrays of up to 4 GiB with offsets of 32 bits, which Triton takes as signed.
    """
    part = None
    if isinstance(weight, NF4Layer):
        if not 2**31 < weight.stack.codes.size <= 2**32:
            return weight
        part, weight = weight.part, dataclasses.replace(weight, part=None).picked()
    return NF4Layer(jax.tree.map(lambda leaf: leaf[None], weight), np.int32(0), part)
