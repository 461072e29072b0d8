"""Measure whole runs of the train command on the GPU at hand and write one JSON of rows.

    python benchmarks/make_random_model.py /tmp/llama3-8b-random
    python benchmarks/bench_train.py --out train_step.json --systems jaxtune unsloth hf --cases fast balanced balanced

Each case is `python -m jaxtune.train --config configs/llama3-8b-random.yaml` with overrides, in a process of its own,
since JAX cannot reset its peak counter. Peers (`peers/qlora.py`) do all their cases in one process, loaded once, the
peak reset before each. Milliseconds are medians over the steps after the third; the spread is the distance between the
quartiles; the input's percent are the time that steps waited for their batch. Peaks are the allocator's, ours with
loading included; beside them stand what XLA plans for the compiled step and what the plan said before it was compiled.
Seconds: `start` until the command has imported, `first` from its call to the first step's end, `end` from the last step
to the end of the process; `load` and `compile` (with tracing) pass at the same time where the compile cache has the
programs. A case that is named twice finds them there the second time; rows `first_step` (compilation and step) and
`load` are taken from such runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from jaxtune.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "llama3-8b-random.yaml"
WARM_UP_STEPS = 3
_LEAN = ["train.remat=lean", "train.optim=paged_adamw_8bit", "model.embedding_on_host=true"]


@dataclasses.dataclass(frozen=True)
class Case:
    """overrides: of the configuration. peers: what peers keep of activations (`peers/qlora.py --cases`)."""

    overrides: Sequence[str]
    batch: int = 4
    length: int = 2048
    steps: int = 14
    peers: Mapping[str, str] = dataclasses.field(default_factory=dict)


_PACKED = ("data.packing=true", "train.gradient_accumulation_steps=4", "data.train={model}/documents.jsonl")
CASES = {
    "fast": Case(["train.remat=none"], peers={"unsloth": "none", "hf": "none"}),
    "fast_fp8": Case(["train.remat=none", "train.compute=fp8"]),
    "fast_fp8_backward": Case(["train.remat=none", "train.compute=fp8_backward"]),
    "balanced_fp8": Case(["train.remat=offload", "train.compute=fp8"]),
    "selective": Case(["train.remat=auto", "train.memory_limit=36.6GiB"]),
    "middle": Case(["train.remat=selective"]),
    "full": Case(["train.remat=full"], peers={"unsloth": "full", "hf": "full"}),
    "balanced": Case(["train.remat=offload"], peers={"unsloth": "offload"}),
    # As its users have it: nothing named, 20 steps.
    "wall_20": Case(["train.remat=auto"], steps=20),
    # Of bitsandbytes' 4-bit form of the same model (`peers/qlora.py --save-4bit`).
    "from_4bit": Case(["train.remat=offload", "model.name_or_path={model}-4bit"], steps=4),
    "lean": Case(_LEAN),
    "lean_head_int8": Case([*_LEAN, "model.head=int8"]),
    "lean_head_nf4": Case([*_LEAN, "model.head=nf4"]),
    "long": Case(["train.remat=offload"], 1, 8192, peers={"unsloth": "offload", "hf": "full"}),
    "large": Case(["train.remat=offload"], 16, steps=8, peers={"unsloth": "offload", "hf": "full"}),
    "packed": Case(["train.remat=offload", *_LEAN[1:], *_PACKED], 2, steps=8, peers={"unsloth": "packed"}),
    "packed_full_rows": Case(["train.remat=none", "data.packing=true"]),
    "small": Case(["train.remat=none"], 1, 256, steps=40, peers={"unsloth": "none", "hf": "full"}),
}


def measure(name: str, model: str, log: Path, timeout: float, cache: Path) -> dict[str, object]:
    """Run one case through the train command and read its metrics."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"model.name_or_path={model}", f"data.train={model}/train.jsonl"]
        settings += [override.format(model=model) for override in case.overrides]
        settings += [f"output.dir={scratch}/run", f"output.compile_cache={cache}", f"train.max_steps={case.steps}"]
        settings += [f"train.batch_size={case.batch}", f"data.max_length={case.length}"]
        command = [sys.executable, "-m", "jaxtune.train", "--config", str(CONFIG)]
        command += [part for setting in settings for part in ("--set", setting)]
        status, times = _timed(command, log, timeout)
        row: dict[str, object] = {"case": name, "system": "jaxtune"}
        if status != 0:
            return row | {"failed": log.read_text()[-400:]}
        records = read_metrics(Path(scratch) / "run" / "metrics.jsonl")
        settings_used = yaml.safe_load((Path(scratch) / "run" / "config.yaml").read_text())
    start = {key: value for record in records if "loss" not in record for key, value in record.items()}
    steps = [record for record in records if "loss" in record]
    after = steps[min(WARM_UP_STEPS, len(steps) - 1) :]
    timed = [record["step_seconds"] * 1e3 for record in after]
    waited = [record["input_seconds"] * 1e3 for record in after]
    quartiles = statistics.quantiles(timed, n=4) if len(timed) > 1 else timed * 3
    learnt = [record["tokens_per_second"] for record in after]
    return row | {
        "policy": start["remat"],
        "compute": compute
        if (compute := settings_used["train"]["compute"]) != "dtype"
        else settings_used["model"]["dtype"],
        "batch": case.batch,
        "seq": case.length,
        "tokens_per_s": round(statistics.median(learnt)),
        "ms_per_step": round(statistics.median(timed), 1),
        "spread_ms": round(quartiles[2] - quartiles[0], 1),
        "input_percent": round(100 * sum(waited) / sum(timed), 3),
        "peak_gib": _gib(steps[-1].get("device_bytes")),
        "step_gib": _gib(start["compiled_bytes"]),
        "predicted_gib": _gib(start["planned_bytes"]),
        "seconds": {
            "start": round(times["find the model"], 1),
            "data": round(start["encode_the_data_seconds"], 1),
            "load": round(start["load_the_model_seconds"], 1),
            "compile": round(start["trace_the_step_seconds"] + start["compile_the_step_seconds"], 1),
            "first_step": round(steps[0]["step_seconds"], 2),
            "first": round(times["step 1/"], 1),
            "end": round(times["end"] - times[f"step {case.steps}/"], 1),
            "wall": round(times["end"], 1),
        },
        "losses": [round(steps[i]["loss"], 4) for i in (0, 1, 2, 3, 4, 10) if i < len(steps)],
    }


def _timed(command: Sequence[str], log: Path, timeout: float) -> tuple[int, dict[str, float]]:
    """A command's exit status, and when it began each phase and ended each step (by how their lines begin), in seconds
    from its call. Its lines go to the log, each with its time.

    Raises:
        subprocess.TimeoutExpired: it took longer; it was ended.
    """
    times: dict[str, float] = {}
    started = time.perf_counter()
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)
    late = threading.Timer(timeout, process.kill)
    late.start()
    assert process.stdout is not None
    with log.open("a") as file:
        for line in process.stdout:
            now = time.perf_counter() - started
            file.write(f"{now:8.2f} {line}")
            mark = re.match(r"step \d+/|[a-z][a-z -]+(?= \.\.\.$)", line)
            if mark is not None:
                times.setdefault(mark[0], now)
    status = process.wait()
    late.cancel()
    times["end"] = time.perf_counter() - started
    if times["end"] >= timeout:
        raise subprocess.TimeoutExpired(command, timeout)
    return status, times


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


def measure_peer(
    names: Sequence[str], system: str, options: argparse.Namespace, log: Path, keep: Callable[[dict[str, object]], None]
) -> None:
    """Those of the cases that a peer has, in one process of its own; `keep` gets each row as it comes."""
    cases = {name: CASES[name] for name in names if system in CASES[name].peers}
    command = [options.peer_python, str(ROOT / "benchmarks" / "peers" / "qlora.py"), "--system", system]
    command += ["--model", options.model, "--cases"]
    command += [f"{name}={case.peers[system]}:{case.batch}x{case.length}" for name, case in cases.items()]
    missing = set(cases)
    if not cases:
        return
    # Unsloth writes what it compiles into the current directory.
    with tempfile.TemporaryDirectory() as scratch, log.open("a") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=scratch)
        late = threading.Timer(options.timeout * len(cases), process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith('{"case"'):
                row = json.loads(line)
                missing.discard(row["case"])
                keep(row)
        process.wait()
        late.cancel()
    for name in sorted(missing):
        keep({"case": name, "system": system, "failed": log.read_text()[-400:]})


def derived(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The rows that say what several runs do together: the first step, cold and from the compile cache; loading."""
    ours = [row for row in rows if row["system"] == "jaxtune" and "failed" not in row]
    found: list[dict[str, object]] = []
    for name in dict.fromkeys(row["case"] for row in ours):
        runs = [row for row in ours if row["case"] == name]
        first = [round(row["seconds"]["compile"] + row["seconds"]["first_step"], 1) for row in runs]
        if len(runs) > 1:
            seconds = {"cold": first[0], "compile_cache": min(first[1:])}
            found.append(
                {"case": "first_step", "of": name, "system": "jaxtune", "policy": runs[0]["policy"]}
                | {"seconds": seconds}
            )
    loads = {
        "bf16": [r for r in ours if r["case"] != "from_4bit"],
        "4bit": [r for r in ours if r["case"] == "from_4bit"],
    }
    seconds = {name: min(row["seconds"]["load"] for row in runs) for name, runs in loads.items() if runs}
    return [*found, {"case": "load", "system": "jaxtune", "seconds": seconds}] if seconds else found


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
    parser = argparse.ArgumentParser(description="Measure whole runs of the train command, and peers beside them.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="/tmp/llama3-8b-random", help="directory of make_random_model.py")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--systems", nargs="+", choices=["jaxtune", "unsloth", "hf"], default=["jaxtune"])
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and the peers")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case")
    parser.add_argument(
        "--compile-cache", type=Path, help="directory of compiled programs; not given, one for this call"
    )
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log = options.out.with_suffix(".log")
    rows: list[dict[str, object]] = []

    def keep(row: dict[str, object]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        # Without the header, which would start a GPU client in this process while the cases are measured.
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as own_cache:
        cache = options.compile_cache or Path(own_cache)
        for system in options.systems:
            if system != "jaxtune":
                measure_peer(list(dict.fromkeys(options.cases)), system, options, log, keep)
                continue
            for name in options.cases:
                try:
                    keep(measure(name, options.model, log, options.timeout, cache))
                except subprocess.TimeoutExpired:
                    keep({"case": name, "system": system, "failed": f"longer than {options.timeout:.0f} s"})
    for row in derived(rows):
        keep(row)
    options.out.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
