"""A grid of settings as its users run it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from runs import WriteRun

from jaxtune import sweep
from jaxtune.errors import UserError


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )


def test_grid_is_every_combination_under_names_that_files_may_have(tmp_path: Path) -> None:
    points = sweep.grid(["lora.r=8,16", "lora.target_modules=[q_proj],[q_proj, v_proj]"], tmp_path)
    assert [tuple(point.settings.values()) for point in points] == [
        (8, ["q_proj"]),
        (8, ["q_proj", "v_proj"]),
        (16, ["q_proj"]),
        (16, ["q_proj", "v_proj"]),
    ]
    assert len({point.directory for point in points}) == 4
    assert all("/" not in point.name and " " not in point.name for point in points)


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (["lora.r"], "write section.key=value,value"),
        (["r=8"], "write section.key=value,value"),
        (["lora.r="], "write section.key=value,value"),
        (["lora.r=8", "lora.r=16"], "the key is given twice"),
        (["lora.r=8,8"], "a value is given twice"),
        (["lora.r=[8"], "no valid YAML"),
    ],
)
def test_axes_that_cannot_be_meant(tmp_path: Path, axes: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        sweep.grid(axes, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--grid", "lora.r=8,0"], "lora.r is 0"),
        (["--grid", "lora.rank=8"], "unknown key lora.rank"),
        (["--grid", "lora.r=8", "--side-by-side", "2"], "--side-by-side needs --memory-limit"),
        (["--grid", "lora.r=8", "--memory-limit", "much"], "--memory-limit is 'much'"),
    ],
)
def test_mistakes_show_before_the_first_run(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert sweep.main(["--config", str(write_run()), "--out", str(tmp_path / "sweep"), *arguments]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_interrupted_runs_get_one_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would stop them without saving, so that a terminal's Ctrl-C must not reach them too."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\ntrap 'echo TERM; exit 143' TERM\nps -o sid= $$\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    (point,) = sweep.grid(["lora.r=8"], tmp_path)

    def stop(_: str) -> None:
        while not (point.log.is_file() and point.log.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run_points([point], "run.yaml", [], side_by_side=1, limit=None, say=stop)
    session, signal = point.log.read_text().split()
    assert int(session) != os.getsid(0)
    assert signal == "TERM"


@pytest.mark.slow
def test_runs_side_by_side_one_of_which_fails(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(lora={"target_modules": ["v_proj"]}, train={"max_steps": 2})
    out = tmp_path / "sweep"
    arguments = ["--config", str(config), "--out", str(out), "--side-by-side", "2", "--memory-limit", "8GiB"]
    # A learning rate without bounds ends in a loss that is not finite.
    assert sweep.main([*arguments, "--grid", "train.learning_rate=1e-3,1e+38"]) == 1
    printed = capsys.readouterr().out
    results = json.loads((out / "sweep.json").read_text())
    assert [result["status"] for result in results] == [0, 2]
    assert results[0]["train.learning_rate"] == "1e-3"
    assert results[0]["eval_loss"] > 0
    assert "failed (2)" in printed
    page = (out / "sweep.html").read_text()
    assert "held-out loss" in page
    assert "<svg" in page
    assert "<th>run</th>" in page
    assert "<td>02</td>" in page
    assert "not finite" in next(out.glob("02_*.log")).read_text()
    before = sorted(path.stat().st_mtime for path in out.glob("01_*/**/*"))
    assert sweep.main([*arguments, "--grid", "train.learning_rate=1e-3"]) == 0
    assert sorted(path.stat().st_mtime for path in out.glob("01_*/**/*")) == before, "a complete run ran again"
    assert sweep.main([*arguments, "--grid", "train.learning_rate=1e-3", "--set", "lora.lora_alpha=3"]) == 2
    assert "holds a run of other settings" in capsys.readouterr().err
