"""A model's parameter tree as an Orbax directory that any JAX program reads.

Layout: `variables/` is an Orbax PyTree checkpoint of nested dicts, {"params": the base model, "lora": an adapter, if
there is one}; a packed weight is the dict of its arrays (`codes`, `absmax`, and with double quantisation
`nested_absmax`, `nested_offset`). `tree.json` says of each leaf its dtype and shape, of each packed weight what its
bytes mean, and the adapter's scaling. Beside them stand config.json and the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from convert.json_files import read_json
from convert.safetensors_io import TensorInfo, write_json
from pallas_kernels.nf4 import NF4Tensor

MARKER = "tree.json"
_VARIABLES = "variables"
_ARRAYS = ("codes", "absmax", "nested_absmax", "nested_offset")
_STATIC = ("shape", "dtype", "block_size", "nested_block_size", "nested_dtype")


def is_tree(directory: Path) -> bool:
    """Whether `save_tree` wrote this directory."""
    return (directory / MARKER).is_file()


def save_tree(directory: Path, variables: Mapping[str, Any], *, lora_scaling: float | None = None) -> None:
    """Write a model's variables into an existing directory.

    Args:
        directory: where `variables/` and `tree.json` are made; neither may be there.
        variables: {"params": ..., "lora": ...}, nested dicts of NumPy arrays and `NF4Tensor`s with NumPy leaves.
        lora_scaling: on B A, where there is an adapter.
    """
    packed: dict[str, dict[str, Any]] = {}
    plain = _unpacked(variables, (), packed)
    leaves = {"/".join(path): (leaf.dtype.name, list(leaf.shape)) for path, leaf in _leaves(plain, ())}
    # Packed codes are as good as random: compressing takes three times as long and saves a tenth.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save((directory / _VARIABLES).absolute(), plain)
    # Last: without it the directory is no tree.
    write_json(directory / MARKER, {"format": 1, "leaves": leaves, "packed": packed, "lora_scaling": lora_scaling})


def load_tree(directory: Path) -> dict[str, Any]:
    """The variables, of NumPy arrays and `NF4Tensor`s, bit for bit as they were saved.

    Raises:
        ValueError: a damaged directory, or one of a later format.
    """
    marker = _marker(directory)
    wanted = _nested({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in marker["leaves"]})
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(
                (directory / _VARIABLES).absolute(), args=ocp.args.PyTreeRestore(item=wanted, restore_args=wanted)
            )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{directory}: its arrays cannot be read ({error}); convert the model again") from error
    found = {"/".join(path): (leaf.dtype.name, list(leaf.shape)) for path, leaf in _leaves(tree, ())}
    if found != {path: (dtype, shape) for path, (dtype, shape) in marker["leaves"].items()}:
        raise ValueError(f"{directory}: its arrays are not those that {MARKER} lists; convert the model again")
    for path, static in marker["packed"].items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node[parent]
        arrays = {name: node[key].get(name) for name in _ARRAYS}
        node[key] = NF4Tensor(**arrays, **(static | {"shape": tuple(static["shape"])}))
    return tree


def lora_scaling(directory: Path) -> float | None:
    """The factor on B A of the adapter in the directory; None where there is none."""
    return _marker(directory).get("lora_scaling")


def tree_infos(directory: Path) -> dict[str, TensorInfo]:
    """Dtype and shape of each leaf by its path, joined with "/"; no array is read."""
    leaves = _marker(directory)["leaves"]
    return {path: TensorInfo(np.dtype(dtype), tuple(shape)) for path, (dtype, shape) in leaves.items()}


def tree_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold the arrays."""
    return tuple(sorted(file for file in (directory / _VARIABLES).rglob("*") if file.is_file()))


def _marker(directory: Path) -> dict[str, Any]:
    marker = read_json(directory / MARKER, "damaged", "convert the model again")
    if marker.get("format") != 1 or not {"leaves", "packed"} <= set(marker):
        raise ValueError(f"{directory / MARKER}: not of format 1; convert the model again")
    return marker


def _unpacked(tree: Mapping[str, Any], path: tuple[str, ...], packed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The tree with packed weights as dicts of arrays, noting in `packed` what they mean."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, NF4Tensor):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            packed["/".join(here)] = {name: fields[name] for name in _STATIC}
            plain[key] = {name: np.asarray(fields[name]) for name in _ARRAYS if fields[name] is not None}
        else:
            plain[key] = _unpacked(value, here, packed) if isinstance(value, Mapping) else np.asarray(value)
    return plain


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], np.ndarray]]:
    pairs: list[tuple[tuple[str, ...], np.ndarray]] = []
    for key, value in tree.items():
        pairs += _leaves(value, (*path, key)) if isinstance(value, Mapping) else [((*path, key), value)]
    return pairs


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return tree
