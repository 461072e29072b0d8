"""Measure whole runs of the train command on the GPU at hand and write one JSON of rows.

    python benchmarks/make_random_model.py /tmp/llama3-8b-random
    python benchmarks/bench_train.py --out benchmarks/results/nvidia-h200/starting_line.json

Each case is `python -m jaxtune.train --config configs/llama3-8b-random.yaml` with overrides, in a process of its own,
since JAX cannot reset its peak counter. Milliseconds are medians over the steps after the third; the spread is the
distance between the quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from jaxtune.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "llama3-8b-random.yaml"
WARM_UP_STEPS = 3
CASES = {
    "none": ["train.remat=none"],
    "full": ["train.remat=full"],
    "offload": ["train.remat=offload"],
    "full-packed": ["train.remat=full", "data.packing=true"],
    "none-packed": ["train.remat=none", "data.packing=true"],
    "offload-16x2048": ["train.remat=offload", "train.batch_size=16"],
    "offload-1x8192": ["train.remat=offload", "train.batch_size=1", "data.max_length=8192"],
    "full-1x8192": ["train.remat=full", "train.batch_size=1", "data.max_length=8192", "data.packing=true"],
}


def measure(case: str, overrides: list[str], log: Path, timeout: float) -> dict[str, object]:
    """Run one case and read its metrics."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = [*overrides, f"output.dir={scratch}/run", f"output.compile_cache={scratch}/cache"]
        command = [sys.executable, "-m", "jaxtune.train", "--config", str(CONFIG)]
        command += [part for setting in settings for part in ("--set", setting)]
        started = time.perf_counter()
        with log.open("a") as file:
            status = subprocess.run(
                command, stdout=file, stderr=file, timeout=timeout, check=False, cwd=ROOT
            ).returncode
        wall = time.perf_counter() - started
        row: dict[str, object] = {"case": case, "system": "jaxtune", "policy": overrides[0].partition("=")[2]}
        if status != 0:
            return row | {"failed": log.read_text()[-400:]}
        records = read_metrics(Path(scratch) / "run" / "metrics.jsonl")
        settings_used = yaml.safe_load((Path(scratch) / "run" / "config.yaml").read_text())
    start, steps = records[0], [record for record in records if "loss" in record]
    timed = [record["step_seconds"] * 1e3 for record in steps[WARM_UP_STEPS:]]
    quartiles = statistics.quantiles(timed, n=4)
    rows, length = settings_used["train"]["batch_size"], settings_used["data"]["max_length"]
    return row | {
        "compute": settings_used["model"]["dtype"],
        "batch": rows,
        "seq": length,
        "tokens_per_s": round(rows * length / statistics.median(timed) * 1e3),
        "ms_per_step": round(statistics.median(timed), 1),
        "spread_ms": round(quartiles[2] - quartiles[0], 1),
        "peak_gib": round(steps[-1]["device_bytes"] / 2**30, 2),
        "step_temporary_gib": round(start["step_temporary_bytes"] / 2**30, 2),
        "frozen_gib": round(start["frozen_bytes"] / 2**30, 2),
        "load_s": round(start["load_the_model_seconds"], 1),
        "compile_s": round(start["compile_the_step_seconds"], 1),
        "wall_s": round(wall, 1),
        "losses": [round(steps[i]["loss"], 4) for i in (0, 1, 2, 3, 4, 10) if i < len(steps)],
    }


def header() -> dict[str, object]:
    """Versions, device and date."""
    import jax

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "python": sys.version.split()[0],
        "versions": {name: installed(name) for name in names},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure whole runs of the train command.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in options.cases:
        try:
            rows.append(measure(case, CASES[case], options.out.with_suffix(".log"), options.timeout))
        except subprocess.TimeoutExpired:
            rows.append({"case": case, "system": "jaxtune", "failed": f"longer than {options.timeout:.0f} s"})
        print(json.dumps(rows[-1]), flush=True)
        # Without the header, which would start a GPU client in this process while the cases are measured.
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    options.out.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
