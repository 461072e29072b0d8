"""Parse the header of a GGUF file: metadata and the table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
The `gguf` package's own reader keeps one NumPy array per array element, which takes seconds for a vocabulary;
this one reads arrays whole and, unlike it, says when a file ends too early.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

# ggml's own limit.
_MAX_AXES = 4
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class RawTensor:
    """One entry of the tensor table: `shape` row-major (GGUF stores it reversed), `offset` from the file's start."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        block_size, type_size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block_size * type_size


def parse_header(data: memoryview, path: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """Return the metadata and the tensors of a whole GGUF file.

    Args:
        data: The file's bytes (mapped).
        path: Its name, for errors.

    Returns:
        The metadata (arrays of numbers as NumPy arrays, arrays of strings as lists) and the tensors by their GGUF name.

    Raises:
        ValueError: The file is no GGUF file, has another version or byte order, is cut off or malformed.
    """
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file: it starts with {bytes(data[:4])!r}, not b'GGUF'; pass a .gguf file")
    try:
        return _parse(_Cursor(data, path))
    except struct.error:
        raise ValueError(
            f"{path}: the GGUF header ends beyond the file's {len(data)} bytes; download it again"
        ) from None


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    path = cursor.path
    version = cursor.scalar("I")
    if version not in (2, 3):
        # The wrong byte order shows as a version whose low half is zero.
        what = "is big-endian" if version & 0xFFFF == 0 and version else f"has GGUF version {version}"
        raise ValueError(f"{path} {what}; little-endian GGUF of version 2 or 3 is supported: convert the model again")
    tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")

    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{path}: metadata key {key[:200]!r} is there twice; convert the model again")
        metadata[key] = cursor.value(cursor.scalar("I"))

    entries = {}
    for _ in range(tensor_count):
        name = cursor.string()
        axes = cursor.scalar("I")
        if axes > _MAX_AXES:
            raise ValueError(
                f"{path}: tensor {name[:200]!r} has {axes} axes, of at most {_MAX_AXES}; download it again"
            )
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(axes)]))
        if name in entries:
            raise ValueError(f"{path}: tensor {name!r} is listed twice; convert the model again")
        entries[name] = shape, cursor.scalar("I"), cursor.scalar("Q")

    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(
            f"{path}: general.alignment is {alignment!r}, not a number above zero; convert the model again"
        )
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _tensor(name, *entry, start, cursor) for name, entry in entries.items()}
    end = start
    for name, tensor in tensors.items():
        # One behind the other in the order of the table, as llama.cpp demands too.
        if tensor.offset != end:
            raise ValueError(
                f"{path}: the header lies about tensor {name!r}: it is at byte {end}, it claims {tensor.offset}; "
                "download the file again"
            )
        end += -(-tensor.nbytes // alignment) * alignment
    return metadata, tensors


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, cursor: _Cursor) -> RawTensor:
    path, size = cursor.path, len(cursor.data)
    try:
        tensor_type = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(
            f"{path}: tensor {name!r} has GGML type {kind}, unknown to the installed gguf package; upgrade it, "
            "or quantise the model to another type"
        ) from None
    block_size, type_size = GGML_QUANT_SIZES[tensor_type]
    if not shape or shape[-1] % block_size:
        raise ValueError(
            f"{path}: {tensor_type.name} tensor {name!r} of shape {shape}: rows must be whole blocks of {block_size}"
        )
    nbytes = math.prod(shape) // block_size * type_size
    if start + offset + nbytes > size:
        raise ValueError(
            f"{path}: truncated: tensor {name!r} ends at byte {start + offset + nbytes}, the file at {size}; "
            "download it again"
        )
    return RawTensor(tensor_type, shape, start + offset, nbytes)


class _Cursor:
    """A position in the file; reading past the end raises struct.error."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at = data, path, 4

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self._strings(1)[0]

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(self._code(kind))

    def _array(self, kind: int, count: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._strings(count)
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"{self.path}: arrays in arrays at byte {self.at}, which no key has; download it again")
        dtype = np.dtype(self._code(kind)).newbyteorder("<")
        end = self.at + count * dtype.itemsize
        if end > len(self.data):
            raise struct.error
        array = np.frombuffer(self.data[self.at : end], dtype)
        self.at = end
        return array

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: unknown metadata type {kind} at byte {self.at}; download the file again")
        return _SCALARS[GGUFValueType(kind)]

    def _strings(self, count: int) -> list[str]:
        data, at, length_at = self.data, self.at, struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                (length,) = length_at(data, at)
                at += 8 + length
                if at > len(data):
                    raise struct.error
                strings.append(str(data[at - length : at], "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path}: string before byte {at} is no UTF-8 ({error}); convert the model again"
            ) from None
        self.at = at
        return strings
