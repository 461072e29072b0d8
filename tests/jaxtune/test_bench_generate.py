"""benchmarks/bench_generate.py on a small shape: its own check, and a whole row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_row_of_a_small_model() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_generate.py")]
    command += ["--here", "check", "time", "--tiny", "--unroll", "--cases", "batch-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert "failed" not in row
    assert (row["case"], row["batch"], row["new"], row["unroll"]) == ("batch-1", 1, 40, True)
    assert row["tokens_per_s"] > 0
    # In float32, of answers that differ from token to token.
    assert row["off_best_logit"] < 0.01
    assert len(set(row["answer"])) > 12
