"""benchmarks/bench_train.py and show_train.py: rows of several runs, and the README's table, which is theirs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(case: str, policy: str, load: float, compiling: float, step: float) -> dict[str, Any]:
    seconds = {"load": load, "compile": compiling, "first_step": step}
    return {"case": case, "system": "jaxtune", "policy": policy, "seconds": seconds}


def test_first_steps_and_loads_of_several_runs() -> None:
    bench_train = importlib.import_module("bench_train")
    rows = [
        run("fast", "none", 7.0, 12.0, 1.3),
        {"case": "fast", "system": "unsloth", "seconds": {"ready": 40.0}},
        run("fast", "none", 6.0, 2.0, 1.1),
        run("from_4bit", "offload", 2.5, 1.0, 1.0),
        {"case": "lean", "system": "jaxtune", "failed": "no"},
    ]
    first, load = bench_train.derived(rows)
    assert (first["of"], first["policy"]) == ("fast", "none")
    assert first["seconds"] == {"cold": 13.3, "compile_cache": 3.1}
    assert load["seconds"] == {"bf16": 6.0, "4bit": 2.5}


def test_lines_are_timed_and_a_late_command_is_ended(tmp_path: Path) -> None:
    bench_train = importlib.import_module("bench_train")
    code = "import time; print('load the model ...'); print('step 1/2  loss 3'); time.sleep({}); print('step 2/2')"
    command = [sys.executable, "-c", code.format(0.2)]
    status, times = bench_train._timed(command, tmp_path / "log", 60)
    assert status == 0
    assert list(times) == ["load the model", "step 1/", "step 2/", "end"]
    assert 0.15 < times["step 2/"] - times["step 1/"] < times["end"]
    with pytest.raises(subprocess.TimeoutExpired):
        bench_train._timed([sys.executable, "-c", code.format(60)], tmp_path / "log", 0.3)


def test_the_table_is_that_of_the_kept_rows() -> None:
    show = importlib.import_module("show_train")
    result = ROOT / "benchmarks" / "results" / "nvidia-h200" / "train_step.json"
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    table = show.BEGIN + show.table(rows) + show.END
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert result.with_suffix(".svg").read_text(encoding="utf-8").count("<circle") == sum(map(show._in_chart, rows))
    seconds = {"case": "first_step", "of": "lean", "system": "jaxtune", "policy": "lean", "seconds": {"cold": 9.5}}
    assert "| first_step lean | jaxtune | lean | cold 9.5 |" in show.table([*rows, seconds])
