"""Files that somebody made to do harm: one error each, from the command, before anything is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import save_model

from convert.__main__ import main
from convert.peft import save_adapter

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def linked(model: Path, directory: Path) -> Path:
    """The model's files, any of which may then be replaced."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def refused(arguments: list[Any], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one error of the command, which left nothing."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert not [path for path in out.parent.iterdir() if path.name.startswith((out.name, f".{out.name}"))]
    return err


def header(model: Path, change: Change) -> bytes:
    """The model's weights behind a changed header."""
    content = (model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    change(entries)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def raw(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


HEADERS: dict[str, tuple[Change | bytes, str]] = {
    "sizes as text": (lambda all: first(all).update(shape=["330", "64"]), "no list of whole numbers"),
    "sizes as fractions": (lambda all: first(all).update(shape=[330.0, 64.0]), "no list of whole numbers"),
    "three offsets": (lambda all: first(all)["data_offsets"].append(1), "3 numbers instead of 2"),
    "terminal codes": (
        lambda all: all.update({"\x1b[31m\n": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        r"not known: '\x1b[31m\n'",
    ),
    "many names": (
        lambda all: all.update({f"u{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}),
        "and 4800 more",
    ),
    "deep": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "header is damaged (RecursionError"),
    "too long": (raw(b'{"a":"' + b"x" * 11_000_000 + b'"}'), "no safetensors file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(model: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = HEADERS[case]
    directory = linked(model, tmp_path / "model")
    replace(directory / "model.safetensors", change if isinstance(change, bytes) else header(model, change))
    err = refused(["to-safetensors", directory], tmp_path / "out", capsys)
    assert message in err


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([1], "weight_map is no object"),
        ({"x": "a" * 300 + ".safetensors"}, "only .safetensors files beside the index"),
        ({f"x{i}": f"{i}.safetensors" for i in range(100)}, "and 50 more"),
    ],
)
def test_indices(model: Path, tmp_path: Path, weight_map: Any, message: str, capsys: Any) -> None:
    directory = linked(model, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert message in refused(["to-4bit", directory], tmp_path / "out", capsys)
    index.write_text("[" * 100_000)
    assert "not an index of safetensors shards (maximum recursion" in refused(
        ["to-4bit", directory], tmp_path / "out", capsys
    )


CONFIGS: list[tuple[Mapping[str, Any], str]] = [
    ({"num_hidden_layers": 10**18}, "num_hidden_layers must be whole numbers above zero"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"hidden_size": True}, "hidden_size must be whole numbers"),
    ({"vocab_size": 10**400}, "vocab_size must be whole numbers"),
    ({"num_key_value_heads": "4"}, "num_key_value_heads is '4', and must be a whole number above zero"),
    ({"head_dim": 0}, "head_dim is 0, and must be"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000, and must be"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', and must be a number above zero"),
    ({"rope_theta": float("nan")}, "rope_theta is nan, and must be"),
    ({"rope_scaling": [1]}, r"rope_scaling is [1], and must be an object with a rope_type"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling is"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' lacks factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks original_max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "lacks"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 0, "original_max_position_embeddings": 64}},
        "factors that are no numbers above zero",
    ),
    ({"rope_parameters": {"full_attention": 5}}, "rope_parameters is"),
    ({"quantization_config": "nf4"}, "quantization_config is 'nf4', and must be an object"),
    ({"sliding_window": "x"}, "sliding_window is 'x'"),
    ({"layer_types": "abc"}, "layer_types is 'abc'"),
    ({"eos_token_id": ["x"]}, "eos_token_id is ['x']"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_configs(model: Path, tmp_path: Path, change: Mapping[str, Any], message: str, capsys: Any) -> None:
    directory = linked(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    replace(directory / "config.json", json.dumps(config | change).encode())
    assert message in refused(["to-gguf", directory], tmp_path / "out", capsys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


LLAMA = key("general.architecture", 8, text("llama"))
GGUFS: dict[str, tuple[int, int, bytes, str]] = {
    "arrays in arrays": (0, 1, key("a", 9, struct.pack("<IQ", 9, 1) * 100_000), "arrays in arrays"),
    "a key twice": (0, 2, LLAMA + LLAMA, "metadata key 'general.architecture' is there twice"),
    "many axes": (1, 1, LLAMA + tensor("token_embd.weight", (1,) * 9, 0) + bytes(99), "has 9 axes, of at most 4"),
    "into the header": (1, 1, LLAMA + tensor("token_embd.weight", (32, 4), 32) + bytes(9999), "the header lies about"),
    "one on the other": (
        2,
        1,
        LLAMA + tensor("token_embd.weight", (32, 4), 0) + tensor("output.weight", (32, 4), 0) + bytes(9999),
        "the header lies about tensor 'output.weight'",
    ),
}


@pytest.mark.parametrize("case", GGUFS)
def test_ggufs(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, keys, content, message = GGUFS[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + content)
    assert message in refused(["to-safetensors", path], tmp_path / "out", capsys)


METADATA = [
    ("llama.block_count", struct.pack("<II", 4, 2**32 - 1), "llama.block_count is '4294967295', and must be a whole"),
    ("llama.embedding_length", struct.pack("<IQ", 8, 1) + b"x", "llama.embedding_length is 'x', and must be"),
    ("llama.context_length", struct.pack("<IIQ", 9, 4, 0), "llama.context_length is '[]', and must be"),
    ("llama.attention.head_count", struct.pack("<II", 4, 0), "llama.attention.head_count is '0', and must be"),
    ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, np.nan), "epsilon is 'nan', and must be a number"),
    ("tokenizer.ggml.eos_token_id", struct.pack("<Ii", 5, -3), "eos_token_id is -3, of 330 tokens"),
]


@pytest.mark.parametrize(("name", "value", "message"), METADATA)
def test_gguf_metadata(model: Path, tmp_path: Path, name: str, value: bytes, message: str, capsys: Any) -> None:
    path = tmp_path / "model.gguf"
    assert main(["to-gguf", str(model), "--type", "F16", "--out", str(path)]) == 0
    content = path.read_bytes()
    start = content.index(text(name)) + len(text(name))
    # Of these keys each has a value of 4 bytes behind its type.
    changed = content[:start] + value + content[start + 8 :]
    path.write_bytes(changed + bytes(64))
    assert message in refused(["to-safetensors", path], tmp_path / "out", capsys)


def adapter(model: Path, directory: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    a, b = np.ones((layers, 4, width), np.float32), np.ones((layers, width, 4), np.float32)
    tree = {"layers": {"self_attn": {"q_proj": {"lora_A": a, "lora_B": b}}}}
    save_adapter(directory, tree, {"r": 4, "lora_alpha": 8})
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "4"}, "r is '4', and must be a whole number above 0"),
        ({"r": 4.5}, "r is 4.5"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, and must be a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ],
)
def test_adapter_configs(model: Path, tmp_path: Path, change: Mapping[str, Any], message: str, capsys: Any) -> None:
    directory = adapter(model, tmp_path / "adapter")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for command in ("merge", "adapter-to-gguf"):
        assert message in refused([command, model, directory], tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(shape=[int(np.prod(entry["shape"]))]), "an adapter has matrices"),
        (lambda entry: entry.update(shape=[1, *entry["shape"]]), "an adapter has matrices"),
        (lambda entry: entry.update(dtype="I32"), "dtype int32; an adapter has matrices of float32"),
        (lambda entry: entry.update(shape=entry["shape"][::-1]), "says r = 4, the tensors have ranks [64]"),
    ],
)
def test_adapter_tensors(model: Path, tmp_path: Path, change: Change, message: str, capsys: Any) -> None:
    directory = adapter(model, tmp_path / "adapter")
    path = directory / "adapter_model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    for name, entry in entries.items():
        if name != "__metadata__":
            change(entry)
    path.write_bytes(raw(json.dumps(entries).encode()) + content[end:])
    assert message in refused(["merge", model, directory], tmp_path / "out", capsys)


@pytest.mark.parametrize("layer", ["1000000000", "00", "\u0663"])
def test_adapter_layers(model: Path, tmp_path: Path, layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = adapter(model, tmp_path / "adapter")
    path = directory / "adapter_model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    renamed = content[8:end].replace(b"layers.0.", f"layers.{layer}.".encode())
    path.write_bytes(raw(renamed) + content[end:])
    assert "not known: " in refused(["merge", model, directory], tmp_path / "out", capsys)
