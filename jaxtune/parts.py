"""One device's part of a run that is spread over a mesh, and what the devices exchange.

The whole step runs inside of one `shard_map`: every op sees this device's rows, heads and widths as if there were
nothing else, so that kernels need not know of the mesh, and every collective is written here, in `pallas_kernels`'
cross-entropy, or nowhere. Axes:

data: rows of the batch. fsdp: rows too; weights are cut along it and gathered a layer at a time as they are stored,
packed. tensor: heads and widths (arXiv:1909.08053): the linears before attention and before the gated unit give columns
of their result, those behind take rows, and the parts of their result are added up. sequence: tokens of a row; around
attention they are exchanged for heads (arXiv:2309.14509), so that attention sees whole rows and packed documents as on
one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from pallas_kernels.cross_entropy import Vocabulary
from pallas_kernels.lora_linear import PartKey
from pallas_kernels.nf4 import NF4Layer

AXES = ("data", "fsdp", "sequence", "tensor")
# The linears whose input, not whose result, is cut along the tensor axis.
ROW_PARALLEL = ("o_proj", "down_proj")

Config = TypeVar("Config", bound=Any)


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the arrays of a run are cut.

    sizes: devices along each of AXES. frozen, state: trees of PartitionSpecs like the run's frozen weights and
    `TrainState`. vocabulary: how embedding table and head are cut, None where every device has the whole.
    """

    sizes: Mapping[str, int]
    frozen: Any
    state: Any
    vocabulary: Vocabulary | None

    def several(self, *axes: str) -> tuple[str, ...]:
        """Those of the axes that have more than one device."""
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def local(self, frozen: Any) -> Any:
        """The frozen tree without the tensor axis that `mesh.split_linears` gives to linears."""
        if self.sizes["tensor"] == 1:
            return frozen

        def without(leaf: Array, spec: PartitionSpec) -> Array:
            return leaf.reshape(leaf.shape[0], *leaf.shape[2:]) if _has_parts(spec) else leaf

        return {**frozen, "layers": jax.tree.map(without, frozen["layers"], self.frozen["layers"])}

    def decoder(self, config: Config) -> Config:
        """The decoder's config with this device's heads."""
        t = self.sizes["tensor"]
        changed: Config = dataclasses.replace(
            config, num_heads=config.num_heads // t, num_kv_heads=config.num_kv_heads // t
        )
        return changed

    def layer(self, base: Any, adapter: Any) -> tuple[Any, Any]:
        """What this device computes one layer with, gathered from where it is kept.

        base: the layer's subtree, packed weights as `NF4Layer`s. adapter: the layer's subtree.
        """
        base = jax.tree.map(self._weight, base, self.frozen["layers"], is_leaf=lambda leaf: isinstance(leaf, NF4Layer))
        adapter = jax.tree.map(_gathered, adapter, self.state.lora["layers"])
        if self.sizes["tensor"] > 1:
            adapter = {
                group: {name: self._columns(name, pair) for name, pair in linears.items()}
                for group, linears in adapter.items()
            }
        return base, adapter

    def _weight(self, leaf: Any, spec: Any) -> Any:
        def gathered(of_layer: Array, spec: PartitionSpec) -> Array:
            # `local` has taken the axis of parts away.
            kept = PartitionSpec(None, *spec[2:]) if _has_parts(spec) else spec
            return _gathered(of_layer, kept, only="fsdp")

        if not isinstance(leaf, NF4Layer):
            return gathered(leaf, spec)
        return leaf if self.sizes["fsdp"] == 1 else jax.tree.map(gathered, leaf.picked(), spec)

    def _columns(self, name: str, pair: Mapping[str, Array]) -> dict[str, Array]:
        """Of a whole adapter what acts on this device's columns."""
        a, b = pair["lora_A"], pair["lora_B"]
        if name in ROW_PARALLEL:
            return {"lora_A": self._own(a, 1), "lora_B": b}
        return {"lora_A": a, "lora_B": self._own(b, 0)}

    def _own(self, x: Array, axis: int) -> Array:
        size = x.shape[axis] // self.sizes["tensor"]
        return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * size, size, axis)

    def embedded(self, table: Array, tokens: Array) -> Array:
        """Rows [B, T, D] of an embedding table of which this device has some."""
        if self.vocabulary is None:
            return table[tokens]
        vocabulary, first = self.vocabulary, lax.axis_index(self.vocabulary.axes) * table.shape[0]
        others = tuple(axis for axis in vocabulary.axes if axis != vocabulary.tokens)

        def visit(tokens: Array) -> Array:
            if vocabulary.tokens is not None:
                tokens = lax.all_gather(tokens, vocabulary.tokens, tiled=True)
            index = tokens - first
            here = (index >= 0) & (index < table.shape[0])
            rows = jnp.where(here[..., None], table[jnp.where(here, index, 0)], 0)
            rows = lax.psum(rows, others) if others else rows
            return rows if vocabulary.tokens is None else lax.psum_scatter(rows, vocabulary.tokens, tiled=True)

        # Tokens of all devices at once would hold as many times what one device's rows take.
        visits = 1 if vocabulary.tokens is None else self.sizes[vocabulary.tokens]
        b, t = tokens.shape
        if visits == 1 or t % visits:
            return visit(tokens)
        rows = lax.map(visit, tokens.reshape(b, visits, -1).swapaxes(0, 1))
        return rows.swapaxes(0, 1).reshape(b, t, -1)

    def entered(self, x: Array, residual: Array | None) -> tuple[Array, Array | None]:
        """What is added up and passed through linears that are cut by columns: their gradients' parts are summed."""
        if self.sizes["tensor"] == 1:
            return x, residual
        return _entered(x, residual)

    def shared(self, x: Array) -> Array:
        """What leaves such linears' block beside their result, whole on every device: its gradient counts once."""
        return x if self.sizes["tensor"] == 1 else _shared(x, self.sizes["tensor"])

    def left(self, y: Array) -> Array:
        """The sum of the results of a linear that is cut by rows."""
        return y if self.sizes["tensor"] == 1 else _left(y)

    def first_only(self, bias: Array | None) -> Array | None:
        """The bias of a linear that is cut by rows: it is added once."""
        if bias is None or self.sizes["tensor"] == 1:
            return bias
        return jnp.where(lax.axis_index("tensor") == 0, bias, jnp.zeros_like(bias))

    def by_heads(self, *of_tokens: Array) -> list[Array]:
        """Of arrays [B, T, N, H] of this device's tokens and all their heads, all tokens of the rows and some heads."""
        if self.sizes["sequence"] == 1:
            return list(of_tokens)
        return [lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True) for x in of_tokens]

    def by_tokens(self, of_heads: Array) -> Array:
        """The inverse of `by_heads`."""
        if self.sizes["sequence"] == 1:
            return of_heads
        return lax.all_to_all(of_heads, "sequence", split_axis=1, concat_axis=2, tiled=True)

    def rows(self, of_tokens: Array | None) -> Array | None:
        """Whole rows [B, T] of which this device has some tokens."""
        if of_tokens is None or self.sizes["sequence"] == 1:
            return of_tokens
        return lax.all_gather(of_tokens, "sequence", axis=1, tiled=True)

    def own_tokens(self, rows: Array) -> Array:
        """The inverse of `rows`; rows of width 1 are of all tokens."""
        if self.sizes["sequence"] == 1 or rows.shape[1] == 1:
            return rows
        size = rows.shape[1] // self.sizes["sequence"]
        return lax.dynamic_slice_in_dim(rows, lax.axis_index("sequence") * size, size, axis=1)

    def dropout_key(self, key: Array, shape: tuple[int, ...], *, row_parallel: bool) -> Array | PartKey:
        """The key that gives this device's part [B, T, K] of the mask that one device would draw."""
        cut = (("data", "fsdp"), ("sequence",), ("tensor",) if row_parallel else ())
        names = [self.several(*axes) for axes in cut]
        if not any(names):
            return key
        counts = [lax.axis_size(axes) if axes else 1 for axes in names]
        first = [lax.axis_index(axes) * size if axes else jnp.int32(0) for axes, size in zip(names, shape, strict=True)]
        b, t, k = shape
        whole = b * counts[0], t * counts[1], k * counts[2]
        return PartKey(key, jnp.stack(first), (b, t, k), whole)

    def summed(self, sums: Any, gradient: Any) -> tuple[Any, Any]:
        """Sums over all rows of the batch, and the gradient, each device's part of it, over all that had its part."""

        def over_others(leaf: Array, spec: PartitionSpec) -> Array:
            axes = tuple(axis for axis in self.several(*AXES) if axis not in _names(spec))
            return lax.psum(leaf, axes) if axes else leaf

        return self.sums(sums), jax.tree.map(over_others, gradient, self.state.lora)

    def sums(self, of_rows: Any) -> Any:
        """Sums over all rows and tokens of the batch, from those of this device."""
        axes = self.several("data", "fsdp", "sequence")
        return lax.psum(of_rows, axes) if axes else of_rows

    def norm(self, gradient: Any) -> Array:
        """The norm of a tree of which this device has a part."""
        squares: dict[tuple[str, ...], Array] = {}
        specs = jax.tree.leaves(self.state.lora)
        for leaf, spec in zip(jax.tree.leaves(gradient), specs, strict=True):
            square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
            squares[_names(spec)] = squares.get(_names(spec), jnp.float32(0)) + square
        return jnp.sqrt(sum(lax.psum(square, axes) if axes else square for axes, square in squares.items()))


def _has_parts(spec: PartitionSpec) -> bool:
    """Whether this is of a linear with an axis of parts, [L, tensor, ...]."""
    return len(spec) > 1 and spec[1] == "tensor"


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that an array is cut along."""
    return tuple(name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry))


def _gathered(x: Array, spec: PartitionSpec, only: str | None = None) -> Array:
    """One layer [...] of a stack [L, ...] that is cut as `spec` says, put together; `only`: along one axis."""
    for axis, entry in enumerate(spec[1:]):
        names = _names(PartitionSpec(entry))
        names = tuple(name for name in names if only in (None, name))
        if names:
            x = lax.all_gather(x, names, axis=axis, tiled=True)
    return x


@jax.custom_vjp
def _entered(x: Array, residual: Array | None) -> tuple[Array, Array | None]:
    return x, residual


def _entered_bwd(_: None, gradients: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
    # The two are added up at once, so their gradients are the same array.
    gradient, of_residual = gradients
    total = lax.psum(gradient, "tensor")
    return total, None if of_residual is None else total


_entered.defvjp(lambda x, residual: ((x, residual), None), _entered_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shared(x: Array, count: int) -> Array:
    return x


_shared.defvjp(lambda x, count: (x, None), lambda count, _, gradient: (gradient / count,))


@jax.custom_vjp
def _left(y: Array) -> Array:
    return lax.psum(y, "tensor")


_left.defvjp(lambda y: (_left(y), None), lambda _, gradient: (gradient,))
