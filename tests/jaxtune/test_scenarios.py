"""Every run in configs/ is one that can be: its keys, its files, and its memory as the plan has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxtune import plan
from jaxtune.config_checks import parse_bytes
from jaxtune.config_io import check_files, load_config

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {"model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 131072}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
EIGHT = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
ONE = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
THIRTEEN: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32000}
THIRTEEN |= {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
# The model's shape, and the card that the file's first lines plan for.
SCENARIOS = {
    "llama2-13b-24gib": (THIRTEEN, "rtx-4090"),
    "llama3-8b-fast": (EIGHT, "h100"),
    "llama3-8b-12gib": (EIGHT, "rtx-4090"),
    "llama3-8b-long": (EIGHT, "rtx-4090"),
    "llama3-1b-edge": (ONE, "jetson-orin"),
}
# Runs of models that are on no hub: these are made or installed first.
OTHERS = ("quickstart", "llama3-8b-random")


def test_all_are_tested() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {*SCENARIOS, *OTHERS} <= files
    for name in files:
        # Commands in a file's first lines name the file itself.
        head = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").split("\nmodel:")[0]
        assert f"--config configs/{name}.yaml" in head


@pytest.mark.parametrize("name", SCENARIOS)
def test_fits_what_it_is_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shape, device = SCENARIOS[name]
    path = f"configs/{name}.yaml"
    config = load_config(path)
    check_files(config)
    assert f"--device {device}" in Path(path).read_text(encoding="utf-8") or config.train.memory_limit is not None
    (tmp_path / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 1e-5}))
    arguments = ["--config", path, "--set", f"model.name_or_path={tmp_path}", "--device", device]
    assert plan.main([*arguments, "--json"]) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    if config.train.memory_limit is not None:
        limit = parse_bytes("train.memory_limit", config.train.memory_limit)
        assert min(policy["peak_bytes"] for policy in policies.values()) < limit
    assert yaml.safe_load(Path(path).read_text(encoding="utf-8"))["output"]["dir"].startswith("runs/")
