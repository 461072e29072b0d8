"""Read a model from a GGUF file: configuration, tokenizer, and tensors under their Hugging Face names."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from transformers import PreTrainedTokenizerFast

from convert.gguf.config import Metadata, check_architecture, hf_config, kv_heads
from convert.gguf.header import RawTensor, parse_header
from convert.gguf.names import FACTORS, hf_name
from convert.gguf.tokenizer import build_tokenizer
from convert.safetensors_io import TensorInfo, give_back
from pallas_kernels.nf4 import on_all_cores

# Elements that a thread decodes at a time.
_SLAB = 1 << 16
_DENSE = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class GgufTensorInfo(TensorInfo):
    """What `GgufFile.read` returns of one tensor, dtype and shape; `type` and `stored_bytes`: how the file holds it."""

    type: GGMLQuantizationType
    stored_bytes: int


class GgufFile:
    """A model in a GGUF file, memory-mapped: nothing is decoded before it is asked for.

    Attributes:
        path: The file.
        metadata: Every key of the file's header; arrays of numbers are NumPy arrays.
        tensors: By Hugging Face name ("model.layers.0.self_attn.q_proj.weight"), in the order of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map and check the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Not a GGUF file, truncated, of another architecture, or with tensors that no such model has.
            NotImplementedError: A mixture of experts or one part of a split file.
        """
        self.path = Path(path)
        with open(self.path, "rb") as handle:
            if not handle.read(1):
                raise ValueError(f"{self.path}: not a GGUF file: it is empty; pass a .gguf file")
            self._mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        metadata, raw = parse_header(memoryview(self._mapped), self.path)
        self.metadata = Metadata(metadata, self.path)
        if (kind := self.metadata.get("general.type", "model")) != "model":
            raise ValueError(
                f"{self.path}: it is no model (general.type is {str(kind)[:80]!r}); name a model's GGUF file"
            )
        check_architecture(self.metadata)
        architecture = self.metadata.architecture
        self._factors = {word: raw.pop(name) for name, word in FACTORS.items() if name in raw}
        self._raw = {_checked_name(name, tensor, architecture, self.path): tensor for name, tensor in raw.items()}
        self.tensors = {
            name: GgufTensorInfo(self._dtype(name, tensor), tensor.shape, tensor.type, tensor.nbytes)
            for name, tensor in self._raw.items()
        }

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json`; see `convert.gguf.config.hf_config`."""
        embedding = self._raw.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{self.path}: tensor token_embd.weight is missing; pass a file that holds a whole model")
        factors = {word: self._decode(tensor) for word, tensor in self._factors.items()}
        return hf_config(self.metadata, vocab_size=embedding.shape[0], names=self._raw, factors=factors)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template, if the file has one."""
        return self.metadata.get("tokenizer.chat_template")

    def read(self, name: str) -> np.ndarray:
        """Decode one tensor.

        Args:
            name: A key of `tensors`.

        Returns:
            [out, in] (or [out]) in Hugging Face's order of rows: float16 and bfloat16 as stored, all else float32.
            Unquantised tensors may be read-only views of the file.
        """
        give_back(self._mapped)
        heads = None
        if self.metadata.architecture == "llama" and ".q_proj." in name:
            heads = self.metadata.uniform("llama.attention.head_count")
        elif self.metadata.architecture == "llama" and ".k_proj." in name:
            heads = kv_heads(self.metadata)
        tensor = self._decode(self._raw[name], heads)
        # Gemma's norms multiply by 1 + w, and its GGUF files hold the sum.
        return tensor.astype(np.float32) - np.float32(1) if self._is_shifted(name) else tensor

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """Build the tokenizer that the metadata describe; see `convert.gguf.tokenizer.build_tokenizer`."""
        return build_tokenizer(self.metadata)

    def _is_shifted(self, name: str) -> bool:
        return self.metadata.architecture.startswith("gemma") and name.endswith("norm.weight")

    def _dtype(self, name: str, tensor: RawTensor) -> np.dtype:
        return np.dtype(np.float32) if self._is_shifted(name) else _DENSE.get(tensor.type, np.dtype(np.float32))

    def _decode(self, tensor: RawTensor, rotary_heads: int | None = None) -> np.ndarray:
        dense = tensor.type in _DENSE
        shape = tensor.shape if dense else (*tensor.shape[:-1], tensor.row_bytes)
        rows = np.ndarray(shape, _DENSE.get(tensor.type, np.uint8), buffer=self._mapped, offset=tensor.offset)
        if rotary_heads is not None:
            rows = _unpermute(rows, rotary_heads)
        if dense:
            return rows
        decoded = np.empty(tensor.shape, np.float32)
        step = max(_SLAB // tensor.shape[-1], 1)

        def decode(start: int) -> None:
            decoded[start : start + step] = dequantize(rows[start : start + step], tensor.type)

        on_all_cores(decode, range(0, len(rows), step))
        return decoded


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file; raises as `GgufFile` does."""
    return GgufFile(path)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Bring the rows of q or k from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows i and i + H / 2: GGUF files of Llama
    models hold the rows interleaved. Blocks of quantised types lie inside a row, so whole rows move undecoded.
    """
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _checked_name(name: str, tensor: RawTensor, architecture: str, path: Path) -> str:
    """Return the Hugging Face name of a tensor, if a model of the architecture has it and it can be decoded."""
    translated = hf_name(name, architecture)
    if translated is None:
        raise ValueError(f"{path}: a {architecture} model has no tensor {name!r}; load the model's safetensors instead")
    if tensor.type not in _decodable_types():
        supported = ", ".join(kind.name for kind in _decodable_types())
        raise ValueError(
            f"{path}: tensor {name!r} has type {tensor.type.name}; supported: {supported}. "
            "Quantise the model to one of them"
        )
    return translated


@cache
def _decodable_types() -> tuple[GGMLQuantizationType, ...]:
    """The types that the installed gguf package can decode; it has no list of them."""
    decodable = []
    for kind in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        decodable.append(kind)
    return tuple(decodable)
