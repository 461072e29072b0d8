"""`python -m convert inspect`: every kind of checkpoint in a few lines, sizes as they are on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs

from convert.__main__ import main
from convert.peft import save_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = runs.save_model(tmp_path_factory.mktemp("models") / "dense", intermediate_size=128)
    for arguments in (["to-4bit", "--out", "packed"], ["to-gguf", "--type", "Q8_0", "--out", "model.gguf"]):
        command, *options, out = arguments
        assert main([command, str(directory), *options, str(directory.parent / out)]) == 0
    return directory.parent


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


# 14 linears of two layers, 81,920 numbers, and two matrices of 330 rows of 64.
@pytest.mark.parametrize(
    ("name", "form", "linears", "plan"),
    [
        ("dense", "safetensors", "14 in float32, 0.3 MiB", "quantise its 14 linears to NF4"),
        ("packed", "safetensors, bitsandbytes 4-bit", "14 in nf4, 0.1 MiB", "take its 14 packed linears as they are"),
        ("model.gguf", "GGUF", "14 in Q8_0, 0.1 MiB", "quantise its 14 linears to NF4"),
    ],
)
def test_models(model: Path, name: str, form: str, linears: str, plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    head, sizes, *kinds, last = shown(model / name, capsys)
    assert head.startswith(f"{model / name}: llama, {form}, 0.")
    assert sizes == "  2 layers, width 64, MLP 128, 4 heads on 2 of keys, vocabulary 330, context 256"
    assert f"  linears: {linears}" in kinds
    assert last.startswith(f"jaxtune would {plan}")


def test_adapters(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"layers": {"mlp": {"up_proj": {"lora_A": np.ones((2, 3, 64), np.float32)}}}}
    tree["layers"]["mlp"]["up_proj"]["lora_B"] = np.ones((2, 128, 3), np.float32)
    save_adapter(tmp_path / "adapter", tree, {"r": 3, "lora_alpha": 6, "base_model_name_or_path": "somewhere"})
    head, sizes, last = shown(tmp_path / "adapter", capsys)
    assert head == f"{tmp_path / 'adapter'}: LoRA adapter of somewhere"
    assert sizes == "  rank 3, alpha 6, float32, 2 layers of up_proj"
    assert "convert merge BASE ADAPTER" in last
    path = tmp_path / "adapter.gguf"
    assert main(["adapter-to-gguf", str(model / "dense"), str(tmp_path / "adapter"), "--out", str(path)]) == 0
    assert main(["inspect", str(path)]) == 2
    assert "it is no model (general.type is 'adapter')" in capsys.readouterr().err


def test_what_does_not_fit_is_listed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "dense" / "config.json").read_text())
    for file in (model / "dense").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "vocab_size": 331}))
    assert main(["inspect", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "embed_tokens" in message
    assert "layers" in message
