"""Runs of several processes on loopback are the run of one process; what ends one of them ends all."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from compared import computed
from runs import COLOURS, RUN, question, save_model, save_records
from several import logs_of, start_processes

from jaxtune import train


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of 6 steps with two rows for each of two devices."""
    model = tmp_path / "model"
    model.mkdir()
    records = [question(thing) for thing in COLOURS]
    run = {section: dict(values) for section, values in RUN.items()}
    run["model"]["name_or_path"] = str(save_model(model))
    run["data"] |= {"train": str(save_records(tmp_path / "train.jsonl", records * 3))}
    run["data"] |= {"eval": str(save_records(tmp_path / "eval.jsonl", records[:3]))}
    run["output"] = {"dir": str(tmp_path / "several"), "compile_cache": None}
    run["mesh"] = {"fsdp": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_as_one_would(config: Path, tmp_path: Path) -> None:
    """A signal to one of them saves everywhere; the run that goes on ends as one process's run does."""
    command = ["--config", str(config), "--resume", "auto"]
    processes = start_processes([*command, "--set", "train.max_steps=6"], 2, tmp_path)
    metrics = tmp_path / "several" / "metrics.jsonl"
    while processes[0].poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(60) for process in processes]
    said = logs_of(tmp_path, 2)
    assert codes == [143, 143], said
    assert "process 0 of 2, by the command's arguments" in said[0]
    assert all("SIGTERM after step" in text and "which is saved" in text for text in said)

    processes = start_processes(command, 2, tmp_path)
    assert [process.wait(120) for process in processes] == [0, 0], logs_of(tmp_path, 2)
    assert "resumed after step" in logs_of(tmp_path, 2)[0]

    whole = ["--set", f"output.dir={tmp_path / 'one'}", "--set", "mesh.fsdp=1"]
    assert train.main(["--config", str(config), *whole]) == 0
    records = [computed(tmp_path / name) for name in ("several", "one")]
    assert [record["step"] for record in records[0]] == [record["step"] for record in records[1]]
    for name in ("loss", "eval_loss", "grad_norm"):
        values = [[record[name] for record in run if name in record] for run in records]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5, err_msg=name)
    names = sorted(path.name for path in (tmp_path / "several").iterdir())
    assert names == ["adapter", "checkpoints", "config.yaml", "metrics.jsonl", "report.html"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(config: Path, tmp_path: Path) -> None:
    processes = start_processes(["--config", str(config), "--set", "train.max_steps=100000"], 2, tmp_path)
    metrics = tmp_path / "several" / "metrics.jsonl"
    while processes[0].poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.01)
    processes[1].kill()
    assert processes[0].wait(10) == 3, logs_of(tmp_path, 2)
    assert "process 1 of this run has ended (it was killed, or its host is gone)" in logs_of(tmp_path, 2)[0]
