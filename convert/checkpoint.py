"""A model's files, whatever their format: config, and tensors by their Hugging Face names, read when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert import bnb4bit, families, flax_tree
from convert.families.table import Family, Load
from convert.gguf import GgufFile, open_gguf
from convert.json_files import read_json
from convert.safetensors_io import TensorInfo, open_model
from pallas_kernels.nf4 import NF4Tensor


@dataclass(frozen=True)
class Checkpoint:
    """What all formats have in common.

    path: a directory or a GGUF file. hf_config: config.json's content, with its family's defaults. infos: of the stored
    tensors, in the order of the files. read: gives a stored tensor. files: those that hold tensors. gguf: the opened
    file, if it is one.
    """

    path: Path
    hf_config: dict[str, Any]
    infos: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]
    gguf: GgufFile | None = None

    @property
    def family(self) -> Family:
        """The model's family; ValueError where it is not supported."""
        return families.get(self.hf_config["model_type"])

    @cached_property
    def loads(self) -> list[Load]:
        """Every tensor of the model and where it is stored; ValueError lists all that do not fit."""
        return self.family.plan(self.infos, self.hf_config)

    @property
    def linear_rows(self) -> dict[str, int]:
        """Rows of each of a layer's linears, by our name."""
        slots = self.family.slots(self.hf_config)
        return {slot.path[-2]: slot.shape[0] for slot in slots if slot.is_linear and slot.layer == 0}

    @property
    def is_packed(self) -> bool:
        """Whether any weight is stored in bitsandbytes' 4 bits."""
        return any(load.is_packed for load in self.loads)

    def weight(self, load: Load) -> np.ndarray | NF4Tensor:
        """One tensor of ours in Hugging Face's form, dense or packed, as it is stored.

        Raises:
            ValueError: a damaged group of packed tensors.
        """
        rows, whole = load.slot.rows, self.stored(load)
        if rows is None:
            return whole
        return bnb4bit.take_rows(whole, *rows) if isinstance(whole, NF4Tensor) else whole[slice(*rows)]

    def stored(self, load: Load) -> np.ndarray | NF4Tensor:
        """`weight`, with all that the stored tensor holds beside this one."""
        if not load.is_packed:
            return self.read(load.slot.name)
        packed = bnb4bit.pack(load.slot.name, {name: self.read(name) for name in load.sources})
        if packed.shape != load.slot.stored_shape:
            raise ValueError(f"{load.slot.name}: packed from shape {packed.shape}, expected {load.slot.stored_shape}")
        return packed


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model directory of safetensors or a GGUF file; tensors stay on disk.

    Of a directory of `flax_tree` there are only config, infos (by path in the tree) and files.

    Raises:
        ValueError: nothing that is read here, damaged files, or an unsupported family.
        NotImplementedError: a variant of these that is not read.
    """
    path = Path(path)
    if path.is_file():
        gguf = open_gguf(path)
        infos = {name: TensorInfo(info.dtype, info.shape) for name, info in gguf.tensors.items()}
        return Checkpoint(path, _completed(gguf.hf_config, path), infos, gguf.read, (path,), gguf)
    if not (path / "config.json").is_file():
        what = "there is no config.json in it" if path.is_dir() else "there is nothing of that name"
        raise ValueError(f"{path}: {what}; name a model's directory or a .gguf file")
    config = read_config(path / "config.json")
    if flax_tree.is_tree(path):
        return Checkpoint(path, config, flax_tree.tree_infos(path), _read_no_tree, flax_tree.tree_files(path))
    model = open_model(path)
    return Checkpoint(path, config, model.infos, model.read, model.files)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of a family that is read here, with the family's defaults.

    Raises:
        ValueError: no such file can be read, no model_type, another family, or values that no model has.
        NotImplementedError: a quantisation that is not read.
    """
    config = read_json(path, "it is no valid JSON", "take the model's own config.json")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path}: it states no model_type; take the model's own config.json")
    config = _completed(config, path)
    bnb4bit.is_quantized(config)
    return config


def _completed(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config with its family's defaults; ValueError where a model cannot have what it says."""
    try:
        completed = families.completed(config)
        families.get(config["model_type"]).facts(completed)
        return completed
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def _read_no_tree(name: str) -> np.ndarray:
    raise ValueError(f"{name}: a saved tree is read whole, not tensor by tensor; start from the model it was made of")
