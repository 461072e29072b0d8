"""Tensors in the order they are read, put together to a model's tree: on one device, or in parts over a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import nf4
from pallas_kernels.nf4 import NF4Tensor

_PART_BYTES = 2**26


def insert(tree: dict[str, Any], path: tuple[str, ...], value: Any, layer: int | None, count: int) -> None:
    """Put an array, or a packed weight, into its place: a leaf of its own, or one layer of a stack of `count`.

    A stack is made on first sight, cut over a mesh as its first layer is. Afterwards nothing of `value` is needed.

    Raises:
        ValueError: values that are not finite, or packed unlike the same linear's other layers.
    """
    *parents, key = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if layer is None:
        tree[key], finite = value, all_finite(value)
    else:
        if key not in tree:
            tree[key] = jax.tree.map(
                lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype, device=_of_stack(leaf)), value
            )
        # The structure of a packed weight includes its block sizes and dtypes.
        stacked: Any = jax.tree.structure(tree[key])
        if stacked != jax.tree.structure(value):
            raise ValueError("packed in another way than in other layers; make the 4-bit checkpoint again")
        cuts = tuple(_of_stack(leaf) for leaf in jax.tree.leaves(value))
        tree[key], finite = _store(tree[key], value, np.int32(layer), cuts)
    # Waiting here keeps the host from running ahead, with every tensor of the queue in device memory.
    if not finite:
        raise ValueError("it holds NaN, infinity or numbers beyond the compute dtype; repair it or set model.dtype")


def all_finite(tree: Any) -> bool:
    """Whether all floating-point numbers of a tree are finite; arrays of the host go to the device in parts."""
    leaves = jax.tree.leaves(tree)
    host = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    parts = [part for leaf in host for part in np.array_split(leaf, -(-leaf.nbytes // _PART_BYTES) or 1)]
    return all(map(_finite, [[leaf for leaf in leaves if not isinstance(leaf, np.ndarray)], *parts]))


@jax.jit
def _finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in floats], jnp.bool_(True))


def _of_stack(leaf: Any) -> NamedSharding | None:
    """How a stack is cut of which this is one layer; None on one device."""
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, P(None, *sharding.spec)) if isinstance(sharding, NamedSharding) else None


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _store(stack: Any, layer: Any, index: jax.Array, cuts: tuple[NamedSharding | None, ...]) -> tuple[Any, jax.Array]:
    """Write one layer into a stack, in place; and whether all of it is finite."""
    leaves, structure = jax.tree.flatten(stack)
    written = []
    for leaf, part, cut in zip(leaves, jax.tree.leaves(layer), cuts, strict=True):
        new = jax.lax.dynamic_update_index_in_dim(leaf, part, index, 0)
        written.append(new if cut is None else jax.lax.with_sharding_constraint(new, cut))
    return jax.tree.unflatten(structure, written), _finite(layer)


def packed(value: np.ndarray | NF4Tensor, dtype: jnp.dtype, double_quant: bool) -> NF4Tensor:
    """Quantise what is dense: on the device where that is a GPU, else on the host. What is packed stays as it is."""
    if isinstance(value, NF4Tensor):
        return value
    if jax.default_backend() == "gpu":
        return nf4.quantize(jax.device_put(value).astype(dtype), double_quant=double_quant)
    return nf4.quantize(value.astype(dtype, copy=False), double_quant=double_quant)


def dense(value: np.ndarray | NF4Tensor, dtype: jnp.dtype, *, host: bool = False) -> Any:
    """The values in `dtype`, on the device or as an array of the host; never a view of the mapped file."""
    values: Any = nf4.dequantize(jax.device_put(value), dtype) if isinstance(value, NF4Tensor) else value
    return np.array(values, dtype) if host else jax.device_put(values, may_alias=False).astype(dtype)
