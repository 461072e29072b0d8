"""A base model and its adapter written in other programs' forms, each into a directory that is already there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import bnb4bit, flax_tree
from convert.checkpoint import Checkpoint
from convert.families.table import Slot
from convert.gguf.adapter import write_gguf_adapter
from convert.gguf.ollama import modelfile
from convert.gguf.writer import write_gguf
from convert.merge import DTYPES, Base, base_values, merged
from convert.output import tokenizer_of, write_description
from convert.peft_modules import placed
from convert.progress import Progress
from convert.safetensors_io import TensorInfo, write_model
from jaxtune.errors import UserError
from jaxtune.head import without_int8
from pallas_kernels import nf4
from pallas_kernels.cross_entropy import Int8Head, decoded_head
from pallas_kernels.nf4 import NF4Tensor


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is exported.

    checkpoint: the base model's files. frozen: its parameters as they were trained with, on the device. lora: the
    adapter's tree of NumPy arrays, or {}. scaling: on B A. modules: whole tensors of the adapter's, which `frozen` has
    already (jaxtune.export.modules). hf_config: of the model with them; None for the base model's. tokenizer: the one
    that was saved beside the adapter; None for the base model's.
    """

    checkpoint: Checkpoint
    frozen: dict[str, Any]
    lora: dict[str, Any]
    scaling: float
    modules: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    hf_config: Mapping[str, Any] | None = None
    tokenizer: Any = None

    @property
    def model(self) -> Checkpoint:
        """The checkpoint with the config of what is exported: config and tokenizer go with the weights."""
        return (
            self.checkpoint
            if self.hf_config is None
            else dataclasses.replace(self.checkpoint, hf_config=dict(self.hf_config))
        )


@dataclasses.dataclass(frozen=True)
class Written:
    """A model that can be read back: where it is, whether in 4 bits, and its precision, a key of `run.LIMITS`."""

    path: Path
    packed: bool
    precision: str


def write_merged(directory: Path, subject: Subject, base: Base, dtype: str) -> list[Written]:
    """Dense safetensors that transformers loads."""
    infos, read = _tensors(subject, base, DTYPES[dtype], directory)
    write_model(directory, infos, read)
    write_description(directory, subject.model, dtype=DTYPES[dtype], tokenizer=subject.tokenizer)
    return [Written(directory, False, _precision(base, "16 bits"))]


def write_merged_4bit(directory: Path, subject: Subject, base: Base, dtype: str) -> list[Written]:
    """bitsandbytes' NF4, quantised anew from the merged weights."""
    infos, read = _tensors(subject, base, DTYPES[dtype], directory)
    infos, read = bnb4bit.packed_model(infos, read, {slot.name for slot in _slots(subject) if slot.is_linear})
    write_model(directory, infos, read, keep_order=True)
    quantization = bnb4bit.quantization_config(compute_dtype=DTYPES[dtype].name)
    write_description(
        directory, subject.model, dtype=DTYPES[dtype], quantization=quantization, tokenizer=subject.tokenizer
    )
    return [Written(directory, True, "quantised")]


def write_ggufs(
    directory: Path, subject: Subject, base: Base, file_types: Sequence[str], name: str, tokenizer: Any
) -> list[Written]:
    """One GGUF file of each type, from merged weights in float32, and a Modelfile for the first."""
    written = []
    for file_type in file_types:
        path = directory / f"{name}-{file_type}.gguf"
        infos, read = _tensors(subject, base, DTYPES["fp32"], path)
        config, vocabulary = subject.model.hf_config, subject.tokenizer or tokenizer_of(subject.checkpoint)
        write_gguf(path, config, infos, read, vocabulary, file_type=file_type, name=name)
        precision = {"F32": "16 bits", "F16": "16 bits", "BF16": "16 bits", "Q8_0": "8 bits"}.get(
            file_type, "quantised"
        )
        written.append(Written(path, False, _precision(base, precision)))
    text = modelfile(written[0].path.name, tokenizer, _stops(subject.checkpoint, tokenizer))
    (directory / "Modelfile").write_text(text, encoding="utf-8")
    return written


def write_gguf_lora(directory: Path, subject: Subject, name: str) -> list[Written]:
    """The adapter alone, for llama.cpp's --lora."""
    if subject.modules:
        raise NotImplementedError(
            f"llama.cpp's adapters have no form for whole tensors ({', '.join(subject.modules)}); export --to gguf"
        )
    path = directory / f"{name}-lora.gguf"
    checkpoint = subject.checkpoint
    write_gguf_adapter(path, checkpoint.hf_config, subject.lora, subject.scaling, rows=checkpoint.linear_rows)
    return []


def write_flax(directory: Path, subject: Subject) -> list[Written]:
    """The parameter trees as they are, for any JAX program and for `model.name_or_path`."""
    dtype = np.asarray(subject.frozen["norm"]["scale"]).dtype
    variables = {"params": jax.device_get(without_int8(subject.frozen, dtype))}
    variables |= {"lora": subject.lora} if subject.lora else {}
    flax_tree.save_tree(directory, variables, lora_scaling=subject.scaling if subject.lora else None)
    write_description(directory, subject.model, dtype=dtype, tokenizer=subject.tokenizer)
    return [Written(directory, True, "exact")]


def _tensors(
    subject: Subject, base: Base, dtype: np.dtype, path: Path
) -> tuple[dict[str, TensorInfo], Callable[[str], np.ndarray]]:
    if base == "original" and subject.checkpoint.is_packed:
        raise UserError(
            f"{subject.checkpoint.path}: it is stored in 4 bits and has no original weights; use --base dequantized"
        )
    values = _as_trained(subject.frozen)
    if base == "original":
        base_slots = [load.slot for load in subject.checkpoint.loads]
        values = placed(base_values(subject.checkpoint, "original"), subject.modules, base_slots)
    infos, read = merged(_slots(subject), values, subject.lora, subject.scaling, dtype)
    return infos, Progress(f"write {path.name}" if path.suffix == ".gguf" else "write", len(infos)).watch(read)


def _slots(subject: Subject) -> list[Slot]:
    return subject.checkpoint.family.slots(subject.model.hf_config)


def _as_trained(frozen: dict[str, Any]) -> Callable[[Slot], np.ndarray]:
    """The frozen weights themselves, decoded layer by layer."""

    def values(slot: Slot) -> np.ndarray:
        leaf: Any = functools.reduce(lambda node, key: node[key], slot.path, frozen)
        if slot.layer is not None:
            leaf = jax.tree.map(lambda stack: stack[slot.layer], leaf)
        if isinstance(leaf, Int8Head):
            return np.asarray(decoded_head(leaf, jnp.dtype(jnp.float32)))
        return np.asarray(nf4.dequantize(leaf) if isinstance(leaf, NF4Tensor) else leaf)

    return values


def _precision(base: Base, precision: str) -> str:
    # The adapter is added to other weights than it was trained on.
    return "quantised" if base == "original" else precision


def _stops(checkpoint: Checkpoint, tokenizer: Any) -> tuple[str, ...]:
    """The tokens that the config lets end an answer."""
    ids = checkpoint.hf_config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(tokenizer.convert_ids_to_tokens(ids))
