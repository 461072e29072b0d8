"""Safetensors in and out, against the safetensors library itself."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from convert import safetensors_io as sio

RNG = np.random.default_rng(7)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int32, np.uint8, np.int8, np.bool_]


def some_tensors() -> dict[str, np.ndarray]:
    tensors = {f"t.{np.dtype(d).name}": (RNG.standard_normal((3, 5)) * 9).astype(d) for d in DTYPES}
    return tensors | {"scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 4), np.float16)}


def infos_of(tensors: dict[str, np.ndarray]) -> dict[str, sio.TensorInfo]:
    return {name: sio.TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def write_raw(path: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    sio.write_file(tmp_path / "a.safetensors", infos_of(tensors), tensors.__getitem__)
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(as_numpy(loaded[name]), tensor)


def test_reads_what_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "a": torch.arange(5, dtype=torch.uint8),
        "c": torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(2)).half(),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = sio.open_model(tmp_path)
    assert model.infos.keys() == tensors.keys()
    for name in tensors:
        assert_same(model.read(name), as_numpy(tensors[name]))


def test_writes_non_contiguous_tensors(tmp_path: Path) -> None:
    tensor = RNG.standard_normal((6, 4)).astype(np.float32).T
    sio.write_file(tmp_path / "a.safetensors", infos_of({"x": tensor}), lambda _: tensor)
    assert_same(sio.SafetensorsModel([tmp_path / "a.safetensors"]).read("x"), tensor)


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 300, 10_000])
def test_shards_hold_the_limit_and_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = {f"x{i}": RNG.standard_normal((n,)).astype(np.float32) for i, n in enumerate([10, 15, 100, 1, 24])}
    infos = infos_of(tensors)
    written = sio.write_model(tmp_path, infos, tensors.__getitem__, max_shard_bytes=max_shard_bytes)
    assert sorted(written) == sorted(tmp_path.iterdir())
    model = sio.open_model(tmp_path)
    assert list(model.infos.items()) == list(infos.items()) or max_shard_bytes == 10_000
    for file in model.files:
        held = sio.SafetensorsModel([file]).infos.values()
        assert len(held) == 1 or sum(info.nbytes for info in held) <= max_shard_bytes
    for name, tensor in tensors.items():
        assert_same(model.read(name), tensor)
    if len(model.files) > 1:
        index = json.loads((tmp_path / sio.INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in infos.values())


def test_overwriting_leaves_no_stale_shard(tmp_path: Path) -> None:
    tensors = {f"x{i}": np.full(10, i, np.float32) for i in range(5)}
    for max_shard_bytes in (40, 80, 1000, 40):
        sio.write_model(
            tmp_path, infos_of(tensors), tensors.__getitem__, max_shard_bytes=max_shard_bytes, overwrite=True
        )
        model = sio.open_model(tmp_path)
        assert {file for file in tmp_path.iterdir() if file.name != sio.INDEX_NAME} == set(model.files)
        assert model.infos.keys() == tensors.keys()
        tensors["x0"] = tensors["x0"] + 1


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    tensors = {"x": np.zeros(3, np.float32)}
    sio.write_model(tmp_path, infos_of(tensors), tensors.__getitem__)
    with pytest.raises(ValueError, match=r"model\.safetensors exists"):
        sio.write_model(tmp_path, infos_of(tensors), tensors.__getitem__, max_shard_bytes=1)
    with pytest.raises(ValueError, match="exists"):
        sio.write_file(tmp_path / "model.safetensors", infos_of(tensors), tensors.__getitem__)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    tensors = {f"x{i}": np.full(10, i, np.float32) for i in range(3)}
    sio.write_model(tmp_path, infos_of(tensors), tensors.__getitem__, max_shard_bytes=40)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def read(name: str) -> np.ndarray:
        return tensors[name] + 1 if name != "x2" else np.zeros(4)

    with pytest.raises(ValueError, match=r"x2: announced as float32 \(10,\), came as float64 \(4,\)"):
        sio.write_model(tmp_path, infos_of(tensors), read, max_shard_bytes=40, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    size, count = 1 << 20, 16
    infos = {f"x{i}": sio.TensorInfo(np.dtype(np.float32), (size // 4,)) for i in range(count)}
    tracemalloc.start()
    try:
        sio.write_model(tmp_path, infos, lambda name: np.full(size // 4, int(name[1:]), np.float32))
        model = sio.open_model(tmp_path)
        for name in model.infos:
            assert model.read(name)[-1] == int(name[1:])
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
    finally:
        tracemalloc.stop()


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        sio.open_model(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        sio.open_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "pytorch_model.bin"]
)
def test_index_may_not_point_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / sio.INDEX_NAME).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match=r"only .safetensors files beside the index"):
        sio.open_model(tmp_path)


def test_index_with_missing_files_or_tensors(tmp_path: Path) -> None:
    tensors = {"x": np.zeros(3, np.float32), "y": np.ones(3, np.float32)}
    sio.write_model(tmp_path, infos_of(tensors), tensors.__getitem__, max_shard_bytes=1)
    index = json.loads((tmp_path / sio.INDEX_NAME).read_text())
    index["weight_map"]["z"] = index["weight_map"]["x"]
    (tmp_path / sio.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="tensors not in the files it names: z"):
        sio.open_model(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lists files that are not in .*: model-00002-of-00002.safetensors"):
        sio.open_model(tmp_path)
    (tmp_path / sio.INDEX_NAME).write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        sio.open_model(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = {"x": np.zeros(3, np.float32)}
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        sio.write_file(path, infos_of(tensors), tensors.__getitem__)
    with pytest.raises(ValueError, match=r"b.safetensors: tensor x is in a.safetensors too"):
        sio.SafetensorsModel(paths)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry("F32", [3], 0, 8)}, bytes(8), "lies about tensor x"),
        ({"x": entry("F32", [2], 4, 12)}, bytes(12), "lies about tensor x"),
        ({"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}, bytes(12), "lies about tensor y"),
        ({"x": entry("F32", [-2, -1], 0, 8)}, bytes(8), "lies about tensor x"),
        ({"x": entry("F32", [2], 0, 8)}, bytes(7), "download"),
        ({"x": entry("F32", [2], 0, 8)}, bytes(9), "download"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "header is damaged"),
        (b'{"x":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', bytes(8), "header is damaged"),
        ([1, 2], b"", "header is damaged"),
        (b"{not json", b"", "header is damaged"),
        (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}', b"", "a key is there twice"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: dict | bytes, data: bytes, message: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=message):
        sio.open_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_no_safetensors_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
        sio.open_model(tmp_path)


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": entry("F4", [4], 0, 2)}, bytes(2))
    with pytest.raises(NotImplementedError, match="tensor x has dtype F4"):
        sio.open_model(tmp_path)
