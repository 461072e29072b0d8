"""One layer's array in a stack of all layers', without a copy of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackLayer:
    """stack [L, ...] at `index`, an int32 scalar: kernels read it where it lies. For inference: it has no gradient."""

    stack: Any
    index: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the one layer."""
        return tuple(self.stack.shape[1:])

    @property
    def size(self) -> int:
        """Elements of the one layer."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Of its elements."""
        return self.stack.dtype


def picked(array: Any) -> Any:
    """An array as it is, a layer of a stack on its own: XLA fuses the choice into what it computes, kernels copy it."""
    if not isinstance(array, StackLayer):
        return array
    return lax.dynamic_index_in_dim(array.stack, array.index, keepdims=False)


def as_stack_layer(array: Any) -> StackLayer:
    """An array as kernels read it: of a stack, at an index."""
    return array if isinstance(array, StackLayer) else StackLayer(array[None], 0)


def written(layer: StackLayer, rows: Any, start: Any) -> Any:
    """The stack with rows [B, T, ...] written into one layer [B, S, ...] of it, from index `start` on."""
    at = (layer.index, 0, start) + (0,) * (rows.ndim - 2)
    return lax.dynamic_update_slice(layer.stack, rows[None].astype(layer.dtype), at)
