"""Conversions stream: the host never holds more than one tensor and 300 MiB beyond what importing takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.families import get
from convert.peft import save_adapter
from convert.safetensors_io import TensorInfo, write_model
from tests.support.runs import save_tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SHARD = 80 * 2**20
PROGRAM = """
import resource, sys
from convert.__main__ import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """678 MB of bfloat16 in shards of one large tensor each."""
    directory = tmp_path_factory.mktemp("model")
    slots = {slot.name: slot.shape for slot in get("llama").slots(CONFIG)}
    infos = {name: TensorInfo(np.dtype(ml_dtypes.bfloat16), shape) for name, shape in slots.items()}
    some = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(ml_dtypes.bfloat16)
    write_model(directory, infos, lambda name: np.resize(some, slots[name]), max_shard_bytes=SHARD)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_tokenizer(directory)
    assert sum(file.stat().st_size for file in directory.glob("*.safetensors")) > 600 * 2**20
    return directory


@pytest.mark.parametrize(
    "arguments",
    [
        ["to-4bit"],
        ["to-safetensors", "--dtype", "fp16"],
        ["to-gguf", "--type", "Q8_0", "--base", "original", "--adapter", "ADAPTER"],
    ],
)
def test_peak(model: Path, tmp_path: Path, arguments: list[str]) -> None:
    if arguments[-1] == "ADAPTER":
        a, b = (np.full((3, *shape), 0.01, np.float32) for shape in ((4, 2048), (16384, 4)))
        tree = {"layers": {"mlp": {"up_proj": {"lora_A": a, "lora_B": b}}}}
        save_adapter(tmp_path / "adapter", tree, {"r": 4, "lora_alpha": 8})
        arguments = [*arguments[:-1], str(tmp_path / "adapter")]
    command = [sys.executable, "-c", PROGRAM, *arguments, str(model), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < SHARD + 300 * 2**20
