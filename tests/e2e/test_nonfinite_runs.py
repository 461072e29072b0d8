"""Whole runs with a record that makes the loss NaN: passed over, or stopped at and gone on from; and the best kept."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compared import computed
from runs import COLOURS, Main, WriteRun, question, save_records

from jaxtune import base, replay
from jaxtune.checkpoint import Checkpoints
from jaxtune.loading import load_tokenizer


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models have NaN where the token ~ is embedded; a file that had would be refused."""
    load = base.load_model

    def load_poisoned(*arguments: Any, source: Any, **options: Any) -> Any:
        token = load_tokenizer(source).convert_tokens_to_ids("~")
        loaded = load(*arguments, source=source, **options)
        table = loaded.frozen["embed_tokens"]["embedding"].at[token].set(np.nan)
        return SimpleNamespace(frozen={**loaded.frozen, "embed_tokens": {"embedding": table}})

    monkeypatch.setattr(base, "load_model", load_poisoned)


@pytest.mark.slow
def test_poisoned_record(
    tmp_path: Path, write_run: WriteRun, run_main: Main, capsys: pytest.CaptureFixture[str], poisoned: None
) -> None:
    records = [question(thing) for thing in COLOURS] * 4
    records[7] = {"instruction": "~", "output": "~ ~ ~"}
    data = save_records(tmp_path / "poisoned.jsonl", records)
    sections: dict[str, dict[str, Any]] = {
        "data": {"train": str(data)},
        "train": {"max_steps": 4, "eval_steps": 1, "gradient_accumulation_steps": 1},
        "output": {"save_steps": 1, "save_total_limit": 1, "keep_best": 1},
    }
    config = write_run(**sections)
    skip = ("--set", "train.on_nonfinite=skip")

    status, err = run_main("--config", config, *skip)
    assert status == 0, err
    out = tmp_path / "out"
    updates = [record for record in computed(out) if "loss" in record]
    skipped = [record["step"] for record in updates if record.get("skipped")]
    assert 0 < len(skipped) < 4
    assert skipped == [record["step"] for record in updates if math.isnan(record["loss"])]
    # What the held-out loss was lowest with is there, though it may not be the newest.
    best = min(updates, key=lambda record: (record["eval_loss"], record["step"]))["step"]
    assert sorted({best, 4}) == Checkpoints(out / "checkpoints").steps()
    assert Checkpoints(out / "checkpoints").best()[0] == best
    assert (out / "adapter-best" / "adapter_model.safetensors").is_file()

    capsys.readouterr()
    assert replay.main(["--run", str(out), "--step", str(skipped[0])]) == 0
    shown = capsys.readouterr().out
    assert f"step {skipped[0]}: loss nan, grad_norm nan, first in the embedded tokens; now in the embedded" in shown
    assert "  embedded tokens  nan\n  layer 0          nan\n" in shown
    assert "~" in shown
    assert replay.main(["--run", str(out), "--step", "99"]) == 2
    assert "there is no checkpoint of step 99" in capsys.readouterr().err

    # The same, stopped at first, and gone on from as the message says.
    stopped = ("--config", config, "--set", f"output.dir={tmp_path / 'stopped'}")
    status, err = run_main(*stopped)
    assert status == 2
    assert f"step {skipped[0]}: loss and grad_norm not finite, first in the embedded tokens" in err
    status, err = run_main(*stopped, "--resume", "auto", *skip)
    assert status == 0, err
    adapters = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (out, tmp_path / "stopped")]
    assert adapters[0] == adapters[1]
    assert str(computed(out)) == str(computed(tmp_path / "stopped"))


def test_nothing_to_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(["--run", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has kept no batch: ")
