"""Runs of several processes on loopback are the run of one process; the death of one ends all, and the run goes on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from compared import computed
from runs import COLOURS, RUN, question, save_model, save_records
from several import logs_of, start_processes

from jaxtune import replay, train


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes; one is killed after its first step; both are started again, and end as one process does."""
    model = tmp_path / "model"
    model.mkdir()
    records = [question(thing) for thing in COLOURS]
    run = {section: dict(values) for section, values in RUN.items()}
    run["model"]["name_or_path"] = str(save_model(model))
    run["data"] |= {"train": str(save_records(tmp_path / "train.jsonl", records * 3))}
    run["data"] |= {"eval": str(save_records(tmp_path / "eval.jsonl", records[:3]))}
    run["train"] |= {"remat": "full"}
    run["output"] |= {"dir": str(tmp_path / "several"), "compile_cache": str(tmp_path / "compiled"), "save_steps": 1}
    run["mesh"] = {"fsdp": 2}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run))
    command = ["--config", str(config), "--resume", "auto"]

    processes = start_processes([*command, "--set", "train.logging_steps=100000"], 2, tmp_path)
    metrics = tmp_path / "several" / "metrics.jsonl"
    while processes[0].poll() is None and not (metrics.is_file() and '"grad_norm"' in metrics.read_text()):
        time.sleep(0.005)
    processes[1].kill()
    assert processes[0].wait(20) == 3, logs_of(tmp_path, 2)
    first, second = logs_of(tmp_path, 2)
    assert "process 1 of this run has ended (it was killed, or its host is gone), and so does process 0" in first
    assert "process 0 of 2, by the command's arguments" in first
    assert "encode the data" not in second

    processes = start_processes(command, 2, tmp_path)
    assert [process.wait(120) for process in processes] == [0, 0], logs_of(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "several").iterdir())
    assert names == ["adapter", "checkpoints", "config.yaml", "metrics.jsonl", "report.html"]

    whole = ["--set", f"output.dir={tmp_path / 'one'}", "--set", "mesh.fsdp=1"]
    assert train.main(["--config", str(config), *whole]) == 0
    losses = [computed(tmp_path / name) for name in ("several", "one")]
    assert [record["step"] for record in losses[0]] == [record["step"] for record in losses[1]]
    for name in ("loss", "eval_loss", "grad_norm"):
        values = [[record[name] for record in run if name in record] for run in losses]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5, err_msg=name)

    # An update that is not finite is traced, and its batch kept, each process's rows by itself.
    broken = tmp_path / "broken"
    settings = ("train.learning_rate=1e30", "train.max_grad_norm=null", "data.eval=null", f"output.dir={broken}")
    processes = start_processes(
        ["--config", str(config), *(part for setting in settings for part in ("--set", setting))], 2, tmp_path
    )
    # Both say why; one may hear of the other's end before.
    assert {process.wait(120) for process in processes} <= {2, 3}, logs_of(tmp_path, 2)
    where = re.search(r"step 2: loss and grad_norm not finite, first (.*); the update is not", logs_of(tmp_path, 2)[0])
    assert where is not None, logs_of(tmp_path, 2)
    capsys.readouterr()
    assert replay.main(["--run", str(broken)]) == 0
    shown = capsys.readouterr().out
    assert f"step 2: loss nan, grad_norm nan, first {where[1]}; now " in shown
    assert shown.count("\nrow ") == RUN["train"]["batch_size"] * RUN["train"]["gradient_accumulation_steps"]
