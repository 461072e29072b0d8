"""Safetensors files in and out: lazy reading of one file or a sharded directory, atomic streaming writing.

Format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the tensors' little-endian bytes, back to back. Read here rather than through the library's NumPy
door, because NumPy has no bfloat16 of its own and because writing a model tensor by tensor needs the header before the
data exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from convert.json_files import read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# A longer header is damage, or an attack on the reader's memory, of which JSON can take fifty times its length. The
# format allows ten times as much; a hundred thousand tensors need as much as this.
_MAX_HEADER_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor: NumPy dtype (bfloat16 is ml_dtypes') and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsModel:
    """The tensors of one or several safetensors files, by name, read lazily.

    infos: name -> TensorInfo, in the order of files and of their bytes: a walk in this order opens each file once.
    files: the files' paths, in that order.
    """

    def __init__(self, files: list[Path]) -> None:
        """Read the headers of `files`; the data stay on disk.

        Raises:
            ValueError: a damaged file, or one name in two files.
            NotImplementedError: a dtype that NumPy and ml_dtypes lack.
        """
        self.files = tuple(files)
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._mapped: tuple[Path, mmap.mmap] | None = None
        for file in files:
            for name, (info, start) in _read_header(file).items():
                if name in self._places:
                    raise ValueError(f"{file}: tensor {name} is in {self._places[name][0].name} too; keep one")
                self.infos[name] = info
                self._places[name] = (file, start)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the mapped file: bytes are fetched as they are touched.

        Only the file last read from stays mapped (besides what views keep alive), and of it the pages of one tensor:
        those of earlier ones are given back, and fetched again if their views are still used.
        """
        file, start = self._places[name]
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None
            with open(file, "rb") as handle:
                self._mapped = (file, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            give_back(self._mapped[1])
        info = self.infos[name]
        return np.ndarray(info.shape, info.dtype, buffer=self._mapped[1], offset=start)


def give_back(mapped: mmap.mmap) -> None:
    """Let go of the pages of a mapped file that were touched, which count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def open_model(directory: str | os.PathLike[str]) -> SafetensorsModel:
    """Open a model directory: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Where both are there the single file is taken, as transformers does. Pickled weights are never opened: unpickling
    runs code.

    Raises:
        ValueError: no safetensors, an index that names files outside the directory, missing files or tensors, damage.
    """
    directory = Path(directory)
    if (directory / SINGLE_NAME).is_file():
        return SafetensorsModel([directory / SINGLE_NAME])
    index = directory / INDEX_NAME
    if index.is_file():
        return _open_sharded(directory, index)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory}: the weights are pickled ({', '.join(pickles[:3])}), and opening a pickle can run any code; "
            "use the model's safetensors revision, or convert it once where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(directory)"
        )
    raise ValueError(f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME} is here; name a model's directory")


def _open_sharded(directory: Path, index: Path) -> SafetensorsModel:
    problem, remedy = "not an index of safetensors shards", "download it again"
    homes = read_json(index, problem, remedy).get("weight_map")
    if not isinstance(homes, dict):
        raise ValueError(f"{index}: {problem} (weight_map is no object); {remedy}")
    for file in set(map(str, homes.values())):
        # Separators of both systems: the check must not depend on where it runs.
        if not file.endswith(".safetensors") or "/" in file or "\\" in file or len(file) > 200:
            raise ValueError(
                f"{index}: names the file {file[:200]!r}; only .safetensors files beside the index are opened"
            )
    absent = sorted(file for file in set(homes.values()) if not (directory / file).is_file())
    if absent:
        raise ValueError(f"{index}: lists files that are not in {directory}: {_listed(absent)}; download them again")
    model = SafetensorsModel([directory / file for file in sorted(set(homes.values()))])
    lost = sorted(name for name, file in homes.items() if model._places.get(name, (None,))[0] != directory / file)
    if lost:
        raise ValueError(f"{index}: tensors not in the files it names: {_listed(lost)}; download the shards again")
    return model


def _listed(names: list[str]) -> str:
    return ", ".join(names[:50]) + (f" and {len(names) - 50} more" if len(names) > 50 else "")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key is there twice")
    return keys


def _read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Name -> (info, first byte in the file), in the order of the bytes; all checked against the file's size."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file}: {size} bytes with header length {length} are no safetensors file; download it again"
            )
        text = handle.read(length)
    data_start = 8 + length
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
        header.pop("__metadata__", None)
        entries = sorted(
            (*_numbers(entry["data_offsets"], 2), name, str(entry["dtype"]), _numbers(entry["shape"]))
            for name, entry in header.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: the safetensors header is damaged ({error!r}); download the file again") from error
    tensors = {}
    expected_start = 0
    for start, end, name, dtype_name, shape in entries:
        if dtype_name not in _DTYPES:
            raise NotImplementedError(f"{file}: tensor {name} has dtype {dtype_name}; readable: {', '.join(_DTYPES)}")
        info = TensorInfo(_DTYPES[dtype_name], shape)
        if min(shape, default=0) < 0 or start != expected_start or end - start != info.nbytes:
            raise ValueError(
                f"{file}: the header lies about tensor {name}: {dtype_name} {list(shape)} is {info.nbytes} bytes from "
                f"{expected_start}, it claims {start} to {end}; download the file again"
            )
        expected_start = end
        tensors[name] = (info, data_start + start)
    if data_start + expected_start != size:
        raise ValueError(
            f"{file}: {size} bytes, of which its header explains {data_start + expected_start}; download the file again"
        )
    return tensors


def _numbers(values: Any, count: int | None = None) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{str(values)[:80]} is no list of whole numbers")
    if count is not None and len(values) != count:
        raise ValueError(f"{len(values)} numbers instead of {count}")
    return tuple(values)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when the block ends well: written beside it, fsynced, renamed.

    Raises:
        ValueError: `path` exists and `overwrite` is false.
    """
    path = Path(path)
    refuse_existing([path], overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself survives a power cut only once the directory is on disk.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def refuse_existing(paths: list[Path], *, overwrite: bool) -> None:
    """Raise ValueError naming the first of `paths` that exists, unless `overwrite`."""
    if not overwrite:
        for path in paths:
            if path.exists():
                raise ValueError(f"{path} exists; name another place, or ask for overwriting")


def write_json(path: str | os.PathLike[str], content: Any, *, overwrite: bool = False) -> None:
    """Write `content` as indented JSON, atomically; ValueError as in `atomic_file`."""
    with atomic_file(path, overwrite=overwrite) as handle:
        handle.write(_json_bytes(content))


def write_file(
    path: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    overwrite: bool = False,
) -> None:
    """Write one safetensors file atomically, asking `read(name)` for one tensor at a time.

    Args:
        path: the file.
        infos: dtype and shape of every tensor: the header is written before the first one is read.
        read: gives the tensor of a name; must agree with `infos`.
        overwrite: replace an existing file.

    Raises:
        ValueError: an existing file, or a tensor that is not what `infos` said.
    """
    with atomic_file(path, overwrite=overwrite) as handle:
        _write_tensors(handle, infos, read)


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _write_tensors(
    handle: BinaryIO, infos: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray], *, keep_order: bool = False
) -> None:
    # Wide dtypes first keeps every tensor aligned to its own width, as the format's other writers do.
    names = list(infos) if keep_order else sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        info = infos[name]
        if info.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name}: dtype {info.dtype} has no safetensors name; cast to one of {', '.join(_DTYPES)}")
        assert offset % info.dtype.itemsize == 0, name
        offsets = [offset, offset + info.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        info, tensor = infos[name], np.asarray(read(name))
        if (tensor.dtype, tensor.shape) != (info.dtype, info.shape):
            raise ValueError(f"{name}: announced as {info.dtype} {info.shape}, came as {tensor.dtype} {tensor.shape}")
        # As bytes, since bfloat16 offers no buffer of its own; only what is not contiguous is copied.
        handle.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        # Gone before the next one is made.
        del tensor


def write_model(
    directory: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = 5_000_000_000,
    keep_order: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write a model directory: `model.safetensors`, or shards of at most `max_shard_bytes` and their index.

    One tensor is in memory at a time. A tensor larger than `max_shard_bytes` gets a shard to itself. No
    file takes its name before all are written, the index last.

    Args:
        directory: made if it is not there.
        infos: as in `write_file`; shards follow its order.
        read: as in `write_file`.
        max_shard_bytes: largest shard.
        keep_order: ask for the tensors in the order of `infos`, which must align each of them to its dtype.
        overwrite: replace a model that is already there, with all its shards.

    Returns:
        The paths written.

    Raises:
        ValueError: a model is there and `overwrite` is false; or as in `write_file`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    patterns = (SINGLE_NAME, INDEX_NAME, "model-*-of-*.safetensors")
    old = [file for pattern in patterns for file in directory.glob(pattern)]
    refuse_existing(old, overwrite=overwrite)
    shards: list[dict[str, TensorInfo]] = [{}]
    room = max_shard_bytes
    for name, info in infos.items():
        if shards[-1] and info.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = info
        room -= info.nbytes
    count = len(shards)
    names = [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    written = [directory / name for name in names]
    with contextlib.ExitStack() as stack:
        # Entered first, so left and renamed last.
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            metadata = {"total_size": sum(info.nbytes for info in infos.values())}
            handle = stack.enter_context(atomic_file(directory / INDEX_NAME, overwrite=overwrite))
            handle.write(_json_bytes({"metadata": metadata, "weight_map": weight_map}))
        for path, shard in zip(written, shards, strict=True):
            _write_tensors(
                stack.enter_context(atomic_file(path, overwrite=overwrite)), shard, read, keep_order=keep_order
            )
    if count > 1:
        written.append(directory / INDEX_NAME)
    for file in old:
        if file not in written:
            file.unlink()
    return written
