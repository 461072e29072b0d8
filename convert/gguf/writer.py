"""Write a model as a GGUF file: any family that llama.cpp has, in any of its usual file types, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedTokenizerFast

from convert.gguf.describe import Description
from convert.gguf.encode import encode
from convert.gguf.mixture import FILE_TYPES, tensor_types
from convert.gguf.vocabulary import vocabulary
from convert.safetensors_io import TensorInfo, atomic_file

# A large matrix is encoded and written in parts of this many elements.
_PART = 1 << 24


def write_gguf(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    tokenizer: PreTrainedTokenizerFast | Mapping[str, Any] | None,
    *,
    file_type: str,
    name: str | None = None,
    overwrite: bool = False,
) -> dict[str, GGMLQuantizationType]:
    """Write one GGUF file atomically, with block types and bytes as llama.cpp's quantiser would give them.

    Args:
        path: the file.
        config: the model's Hugging Face config.
        infos: dtype and shape by Hugging Face name.
        read: gives the tensor of a name; called once for each, layer by layer.
        tokenizer: the model's; or the `tokenizer.*` metadata of the GGUF file it came from, which are kept; None writes
            a file without vocabulary.
        file_type: F32, F16, BF16, Q8_0, Q4_0, Q5_0, Q4_K_M, Q5_K_M or Q6_K.
        name: `general.name`; by default the file's own.
        overwrite: replace an existing file.

    Returns:
        The type of each tensor, by its GGUF name.

    Raises:
        ValueError: an existing file, a family, tensor or tokenizer that GGUF has no form for, values that the type
            cannot hold.
        NotImplementedError: a property that llama.cpp's version of the family lacks.
    """
    path = Path(path)
    description = Description(config)
    hf_names = {description.name(hf_name): hf_name for hf_name in sorted(infos, key=_layer)}
    shapes = {gguf_name: infos[hf_name].shape for gguf_name, hf_name in hf_names.items()}
    architecture = description.architecture.name
    types = tensor_types(
        shapes, file_type, architecture=architecture, layers=description.layers, grouped=description.grouped
    )
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rows = infos["model.embed_tokens.weight"].shape[0]
        tokenizer = vocabulary(tokenizer, rows)

    def values(hf_name: str) -> np.ndarray:
        return description.values(hf_name, read(hf_name))

    header = GGUFWriter(None, architecture)
    header.add_name(name or path.stem)
    header.add_type("model")
    header.add_file_type(FILE_TYPES[file_type][1])
    header.add_quantization_version(2)
    add_metadata(header, {f"{architecture}.{key}": value for key, value in description.metadata.items()})
    add_metadata(header, tokenizer or {"tokenizer.ggml.model": "none"})
    arrays: dict[str, Callable[[], np.ndarray]] = {}
    for gguf_name, factors in description.factors.items():
        add_tensor_info(header, gguf_name, factors.shape, GGMLQuantizationType.F32)
        types[gguf_name] = GGMLQuantizationType.F32
        arrays[gguf_name] = partial(np.asarray, factors)
    for gguf_name, hf_name in hf_names.items():
        add_tensor_info(header, gguf_name, shapes[gguf_name], types[gguf_name])
        arrays[gguf_name] = partial(values, hf_name)
    write(path, header, arrays, types, overwrite=overwrite)
    return types


def add_metadata(header: GGUFWriter, values: Mapping[str, Any]) -> None:
    """Add keys with GGUF's types for Python's: uint32, float32, bool, string, and arrays of these."""
    for key, value in values.items():
        if isinstance(value, bool | np.bool_):
            header.add_bool(key, bool(value))
        elif isinstance(value, int | np.integer):
            header.add_uint32(key, int(value))
        elif isinstance(value, float | np.floating):
            header.add_float32(key, float(value))
        elif isinstance(value, str):
            header.add_string(key, value)
        else:
            header.add_array(key, value.tolist() if isinstance(value, np.ndarray) else list(value))


def add_tensor_info(header: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Announce a tensor of the logical `shape`."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    bytes_shape = (*shape[:-1], shape[-1] // block_size * block_bytes)
    nbytes = int(np.prod(bytes_shape))
    header.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)


def write(
    path: Path,
    header: GGUFWriter,
    arrays: Mapping[str, Callable[[], np.ndarray]],
    types: Mapping[str, GGMLQuantizationType],
    *,
    overwrite: bool,
) -> None:
    """Write a header and its tensors, in the order in which they were announced, each made when its turn comes.

    Raises:
        ValueError: an existing file, or values that the type cannot hold.
    """
    with atomic_file(path, overwrite=overwrite) as handle:
        # The library opens what it writes by name: here the same temporary file, whose end is then ours.
        header.write_header_to_file(Path(handle.name))
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
        header.close()
        handle.seek(0, os.SEEK_END)
        handle.write(bytes(-handle.tell() % GGUF_DEFAULT_ALIGNMENT))
        for name, array in arrays.items():
            try:
                _write_tensor(handle, array(), types[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            handle.write(bytes(-handle.tell() % GGUF_DEFAULT_ALIGNMENT))


def _write_tensor(handle: Any, tensor: np.ndarray, kind: GGMLQuantizationType) -> None:
    matrix = tensor.reshape(-1, tensor.shape[-1])
    step = max(_PART // matrix.shape[1], 1)
    for start in range(0, len(matrix), step):
        handle.write(encode(matrix[start : start + step], kind).data)


def _layer(hf_name: str) -> tuple[int, int]:
    """Sorts the embedding before the layers, the layers by number, and the rest behind them."""
    parts = hf_name.split(".")
    if "layers" in parts:
        return 1, int(parts[parts.index("layers") + 1])
    return (0 if "embed_tokens" in parts else 2), 0
