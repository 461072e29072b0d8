"""Where the arrays of a run lie on a mesh of devices: which axis of each is cut, along which axes of the mesh.

A dimension that the number of devices does not divide is kept whole on every device, which is correct and takes more
memory; what cannot be whole (heads and widths along the tensor axis) is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.config import MeshConfig
from jaxtune.errors import UserError
from jaxtune.lora import GROUP_OF_LINEAR
from jaxtune.models.config import DecoderConfig
from jaxtune.parts import AXES, ROW_PARALLEL, Parts
from jaxtune.step import TrainState, batch_sharding, replicated, state_sharding
from pallas_kernels.cross_entropy import Vocabulary
from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4.reference import decode_scales

# Elements per scale of 8-bit moments, which no cut may part.
_MOMENT_BLOCK = 256


def make_parts(mesh: Mesh | AbstractMesh, frozen: Any, state: TrainState) -> Parts | None:
    """How a run's arrays are cut over the mesh, from the arrays or their shapes; None on one device.

    frozen: as `split_linears` gives it. state: before or after any update.
    """
    if mesh.size == 1:
        return None
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    axes = _vocabulary_axes(sizes, frozen)
    vocabulary = Vocabulary(axes, "fsdp" if "fsdp" in axes else None) if axes else None
    return Parts(sizes, _frozen_specs(sizes, frozen, axes), state_specs(mesh, state), vocabulary)


def place_state(state: TrainState, mesh: Mesh, *, paged: bool) -> TrainState:
    """The train state where the step keeps it."""
    if mesh.size == 1:
        placed: TrainState = jax.device_put(state, state_sharding(mesh, paged=paged))
        return placed
    whole: TrainState = place(state, mesh, state_specs(mesh, state))
    return whole


def placing(mesh: Mesh, decoder: DecoderConfig) -> Callable[[tuple[str, ...], Any, bool], Any] | None:
    """What puts the frozen weights, one tensor after another, where the step keeps them; None on one device.

    The function takes a leaf's path, its value, and whether that has the axis of layers in front. Each device is sent
    its part alone. It raises UserError as `split_linears` does.
    """
    if mesh.size == 1:
        return None
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    table = jax.ShapeDtypeStruct((decoder.vocab_size, decoder.hidden_size), jnp.float32)
    words = P(_vocabulary_axes(sizes, {"embed_tokens": {"embedding": table}}))

    def put(path: tuple[str, ...], value: Any, layers: bool) -> Any:
        *_, name, key = path
        if name not in GROUP_OF_LINEAR:
            return place(value, mesh, words if path in _TABLES else P())
        stack = value if layers else jax.tree.map(lambda leaf: leaf[None], value)
        stack = _split_linear({key: stack}, sizes["tensor"], name)[key]
        specs = _linear_specs(sizes, stack, key, name)
        if not layers:
            stack = jax.tree.map(lambda leaf: leaf[0], stack)
            specs = jax.tree.map(lambda spec: P(*spec[1:]), specs)
        return place(stack, mesh, specs)

    return put


def place_frozen(frozen: Any, state: TrainState, mesh: Mesh) -> tuple[Any, Parts | None]:
    """The frozen weights where the step keeps them, which on a mesh is where `placing` put them; and how all is cut."""
    parts = make_parts(mesh, frozen, state)
    return (place(frozen, mesh, P()) if parts is None else frozen), parts


def placed_structures(frozen: Any, state: TrainState, mesh: Mesh, *, paged: bool) -> tuple[Any, Any, Parts | None]:
    """`place_frozen` and `place_state` for shapes alone: both trees, and how they are cut."""
    frozen = jax.eval_shape(lambda tree: split_linears(tree, mesh.shape["tensor"]), frozen)
    parts = make_parts(mesh, frozen, state)
    if parts is None:
        shardings = state_sharding(mesh, paged=paged)
        return _shapes(frozen, replicated(mesh)), jax.tree.map(lambda s, leaf: _shapes(leaf, s), shardings, state), None

    def placed(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return _shape(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(placed, frozen, parts.frozen), jax.tree.map(placed, state, parts.state), parts


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: _shape(leaf, sharding), tree)


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The tree's arrays on the mesh, each cut as its spec says. `specs` may be one for all."""
    if isinstance(specs, P):
        return jax.tree.map(lambda leaf: _placed(leaf, NamedSharding(mesh, specs)), tree)
    return jax.tree.map(lambda leaf, spec: _placed(leaf, NamedSharding(mesh, spec)), tree, specs)


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.Array) and sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    # Of several processes each makes the parts that its own devices hold.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def own_rows(mesh: Mesh, batch_size: int) -> slice:
    """Which rows of a micro-batch the devices of this process take."""
    places = batch_sharding(mesh).addressable_devices_indices_map((1, batch_size, mesh.shape["sequence"])).values()
    rows = [range(batch_size)[place[1]] for place in places if place is not None]
    return slice(min(part.start for part in rows), max(part.stop for part in rows))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> Any:
    """A batch on the mesh, [accumulation, batch_size, T], from this process's rows of it."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    first = own_rows(mesh, batch_size).start

    def one(own: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            rows = range(batch_size)[index[1]]
            return own[index[0], rows.start - first : rows.stop - first, index[2]]

        return jax.make_array_from_callback((own.shape[0], batch_size, own.shape[2]), sharding, part)

    return {name: one(own) for name, own in batch.items()}


def split_linears(frozen: Mapping[str, Any], tensor: int) -> dict[str, Any]:
    """The frozen tree with the layers' linears cut into `tensor` parts: an axis of parts follows that of layers.

    Linears before attention and the gated unit are cut by their results, o_proj and down_proj by their inputs. A packed
    part is a packed weight of its own; where a cut does not respect the blocks of 8-bit scales, the part has the scales
    as float32, whose values are the same.

    Raises:
        UserError: a block of 64 elements with one scale would be parted.
    """
    if tensor == 1:
        return dict(frozen)
    layers = {**frozen["layers"]}
    for name, group in GROUP_OF_LINEAR.items():
        layers[group] = {**layers[group], name: _split_linear(layers[group][name], tensor, name)}
    return {**frozen, "layers": layers}


def _split_linear(linear: Mapping[str, Any], tensor: int, name: str) -> dict[str, Any]:
    split = dict(linear)
    if tensor > 1 and "kernel" in split:
        cut = _split_packed if isinstance(split["kernel"], NF4Tensor) else _split_dense
        split["kernel"] = cut(split["kernel"], tensor, name)
    if tensor > 1 and "bias" in split and name not in ROW_PARALLEL:
        bias = split["bias"]
        split["bias"] = bias.reshape(bias.shape[0], tensor, -1)
    return split


def _split_dense(w: Any, tensor: int, name: str) -> Any:
    layers, n, k = w.shape
    if name in ROW_PARALLEL:
        return w.reshape(layers, n, tensor, k // tensor).swapaxes(1, 2)
    return w.reshape(layers, tensor, n // tensor, k)


def _split_packed(w: NF4Tensor, tensor: int, name: str) -> NF4Tensor:
    (n, k), layers = w.shape, w.stack_shape[0]
    by_input = name in ROW_PARALLEL
    whole = k // tensor if by_input else n // tensor * k
    if whole % w.block_size:
        raise UserError(
            f"mesh.tensor is {tensor}: {name} [{n}, {k}] cannot be cut so, since its blocks of {w.block_size} "
            "elements would be parted; lower mesh.tensor"
        )
    if by_input:

        def cut(array: Any) -> Any:
            return array.reshape(layers, n, tensor, -1).swapaxes(1, 2).reshape(layers, tensor, -1)

        shape = (n, k // tensor)
    else:

        def cut(array: Any) -> Any:
            return array.reshape(layers, tensor, -1)

        shape = (n // tensor, k)
        if w.is_nested and whole % (w.block_size * w.nested_block_size) == 0:
            offset = jnp.repeat(w.nested_offset[:, None], tensor, axis=1)
            return dataclasses.replace(
                w, codes=cut(w.codes), absmax=cut(w.absmax), nested_absmax=cut(w.nested_absmax), nested_offset=offset,
                shape=shape,
            )  # fmt: skip
    return dataclasses.replace(
        w, codes=cut(w.codes), absmax=cut(decode_scales(w)), nested_absmax=None, nested_offset=None, shape=shape
    )


def check_mesh(mesh: MeshConfig, decoder: DecoderConfig, max_length: int) -> None:
    """Raise UserError where the model's heads and widths, or the rows' length, cannot be spread over the mesh."""
    heads = {"query heads": decoder.num_heads, "key and value heads": decoder.num_kv_heads}
    kept = {f"{what} of each device": count // mesh.tensor for what, count in heads.items()}
    along = {
        "tensor": {**heads, "columns of its MLP": decoder.intermediate_size},
        "sequence": {"tokens of a row (data.max_length)": max_length, **kept},
    }
    for axis, counts in along.items():
        devices = getattr(mesh, axis)
        for what, count in counts.items():
            if count % devices:
                divisors = [n for n in range(1, devices) if all(other % n == 0 for other in counts.values())]
                raise UserError(
                    f"mesh.{axis} is {devices}, which does not divide the {count} {what}; set mesh.{axis} to "
                    f"{' or '.join(map(str, divisors))}"
                )


def _vocabulary_axes(sizes: Mapping[str, int], frozen: Mapping[str, Any]) -> tuple[str, ...]:
    """Along which axes the rows of embedding table and head are cut: the most devices that divide them."""
    tables = [frozen[name][leaf] for name, leaf in _TABLES if name in frozen]
    for axes in (("tensor", "fsdp"), ("fsdp",), ("tensor",)):
        several = tuple(axis for axis in axes if sizes[axis] > 1)
        if several and all(table.shape[0] % _devices(sizes, several) == 0 for table in tables):
            return several
    return ()


_TABLES = (("embed_tokens", "embedding"), ("lm_head", "kernel"))


def _devices(sizes: Mapping[str, int], axes: tuple[str, ...]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _frozen_specs(sizes: Mapping[str, int], frozen: Mapping[str, Any], vocabulary_axes: tuple[str, ...]) -> Any:
    specs = jax.tree.map(lambda leaf: P(), dict(frozen))
    for name, leaf in _TABLES:
        if name in frozen and vocabulary_axes:
            specs[name][leaf] = P(vocabulary_axes)
    for name, group in GROUP_OF_LINEAR.items():
        specs["layers"][group][name] = {
            key: _linear_specs(sizes, leaf, key, name) for key, leaf in frozen["layers"][group][name].items()
        }
    return specs


def _linear_specs(sizes: Mapping[str, int], leaf: Any, key: str, name: str) -> Any:
    stack: tuple[str | None, ...] = (None,) if sizes["tensor"] == 1 else (None, "tensor")
    if key == "bias":
        return P(*stack) if name not in ROW_PARALLEL else P()

    def cut(array: Any) -> P:
        """Along the first axis behind the stack's."""
        size, fsdp = array.shape[len(stack)], sizes["fsdp"]
        return P(*stack, "fsdp") if fsdp > 1 and size % fsdp == 0 else P(*stack)

    if not isinstance(leaf, NF4Tensor):
        return cut(leaf)
    # The outermost scales are one in 16,384 elements: not worth a collective.
    nested = P(*stack) if leaf.is_nested else None
    return dataclasses.replace(
        leaf, codes=cut(leaf.codes), absmax=cut(leaf.absmax), nested_absmax=nested, nested_offset=nested
    )


def state_specs(mesh: Mesh | AbstractMesh, state: TrainState) -> TrainState:
    """Adapters and their moments are cut into consecutive elements, so that a flat block of moments has its own."""
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    kept: dict[str, list[Any]] = {}
    adapters = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.lora)}
    moments = [
        (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    owners = {path: next((name for name in adapters if name in path), None) for path, _ in moments}
    for path, leaf in moments:
        if (owner := owners[path]) is not None:
            kept.setdefault(owner, []).append(leaf)

    def cut(name: str) -> P:
        adapter = adapters[name]
        for axes in (("tensor", "fsdp"), ("fsdp",), ("tensor",)):
            several = tuple(axis for axis in axes if sizes[axis] > 1)
            devices = _devices(sizes, several)
            flat = any(leaf.shape != adapter.shape for leaf in kept.get(name, ()))
            unit = _MOMENT_BLOCK if flat else 1
            if several and adapter.shape[1] % devices == 0 and math.prod(adapter.shape[1:]) % (devices * unit) == 0:
                return P(None, several)
        return P()

    specs = {name: cut(name) for name in adapters}
    lora = jax.tree_util.tree_map_with_path(lambda path, _: specs[jax.tree_util.keystr(path)], state.lora)

    def of_moment(path: Any, _: Any) -> P:
        owner = owners[jax.tree_util.keystr(path)]
        return P() if owner is None else specs[owner]

    opt_state = jax.tree_util.tree_map_with_path(of_moment, state.opt_state)
    rest = jax.tree.map(lambda leaf: P(), dataclasses.replace(state, lora=None, opt_state=None))
    return dataclasses.replace(rest, lora=lora, opt_state=opt_state)
