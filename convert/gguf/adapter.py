"""A LoRA adapter as a GGUF file, for llama.cpp's `--lora` and Ollama's ADAPTER."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from convert.gguf.describe import Description
from convert.gguf.writer import add_tensor_info, write
from convert.peft import to_peft

_TYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16}


def write_gguf_adapter(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    lora: Mapping[str, Any],
    scaling: float,
    *,
    rows: Mapping[str, int] | None = None,
    file_type: str = "F16",
    overwrite: bool = False,
) -> None:
    """Write an adapter for a GGUF file of its base model, whose type may be any.

    Args:
        path: the file.
        config: the base model's Hugging Face config.
        lora: the tree, lora_A [L, R, in] and lora_B [L, out, R], of NumPy arrays.
        scaling: on B A.
        rows: as in `convert.peft.to_peft`.
        file_type: F32 or F16.
        overwrite: replace an existing file.

    Raises:
        ValueError: an existing file, another type, or a family that GGUF files are not written of.
    """
    if file_type not in _TYPES:
        raise ValueError(f"adapter type {file_type!r} cannot be written; choose one of {', '.join(_TYPES)}")
    description = Description(config)
    header = GGUFWriter(None, description.architecture.name)
    header.add_type("adapter")
    header.add_name(Path(path).stem)
    header.add_string("adapter.type", "lora")
    arrays, types, first_rank = {}, {}, None
    for name, tensor in to_peft(lora, config["model_type"], rows).items():
        module, part, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        gguf_name = f"{description.name(module)}.weight.{part.lower()}"
        types[gguf_name] = _TYPES[file_type]
        add_tensor_info(header, gguf_name, tensor.shape, types[gguf_name])
        rank = tensor.shape[0 if part == "lora_A" else 1]
        first_rank = first_rank or rank
        # llama.cpp divides one alpha by each tensor's own rank.
        factor = 1.0 if part == "lora_A" else rank / first_rank
        arrays[gguf_name] = partial(_values, description, f"{module}.weight", part, tensor, factor)
    if first_rank is None:
        raise ValueError("the adapter targets no linear; there is nothing to write")
    header.add_float32("adapter.lora.alpha", scaling * first_rank)
    write(Path(path), header, arrays, types, overwrite=overwrite)


def _values(description: Description, weight: str, part: str, tensor: np.ndarray, factor: float) -> np.ndarray:
    # The rows of B are those of the weight, in llama.cpp's order.
    ordered = description.values(weight, tensor) if part == "lora_B" else tensor
    return ordered if factor == 1.0 else ordered.astype(np.float32) * np.float32(factor)
