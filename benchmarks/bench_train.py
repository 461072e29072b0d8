"""Measure whole runs of the train command on the GPU at hand and write one JSON of rows.

    python benchmarks/make_random_model.py /tmp/llama3-8b-random
    python benchmarks/bench_train.py --out train_step.json --systems jaxtune unsloth hf --cases fast balanced

Each case is `python -m jaxtune.train --config configs/llama3-8b-random.yaml` with overrides, in a process of its own,
since JAX cannot reset its peak counter, and the same work through peers (`peers/qlora.py`). Milliseconds are medians
over the steps after the third; the spread is the distance between the quartiles; the input's percent are the time in
which the host gets the next batch and sends it, while the device computes. Peaks are the allocator's, loading included;
beside ours stand what XLA plans for the compiled step and what the plan said before it was compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from jaxtune.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "llama3-8b-random.yaml"
WARM_UP_STEPS = 3
_LEAN = ["train.remat=lean", "train.optim=paged_adamw_8bit", "model.embedding_on_host=true"]


@dataclasses.dataclass(frozen=True)
class Case:
    """overrides: of the configuration. peers: what peers keep of activations (`peers/qlora.py --checkpointing`)."""

    overrides: Sequence[str]
    batch: int = 4
    length: int = 2048
    peers: Mapping[str, str] = dataclasses.field(default_factory=dict)


CASES = {
    "fast": Case(["train.remat=none"], peers={"unsloth": "none", "hf": "none"}),
    "fast_fp8": Case(["train.remat=none", "train.compute=fp8"]),
    "fast_fp8_backward": Case(["train.remat=none", "train.compute=fp8_backward"]),
    "balanced_fp8": Case(["train.remat=offload", "train.compute=fp8"]),
    "selective": Case(["train.remat=auto", "train.memory_limit=36.6GiB"]),
    "middle": Case(["train.remat=selective"]),
    "full": Case(["train.remat=full"], peers={"unsloth": "full", "hf": "full"}),
    "balanced": Case(["train.remat=offload"], peers={"unsloth": "offload"}),
    "lean": Case(_LEAN),
    "long": Case(["train.remat=offload"], 1, 8192, peers={"unsloth": "offload", "hf": "full"}),
    "large": Case(["train.remat=offload"], 16, peers={"unsloth": "offload", "hf": "full"}),
    "packed": Case(
        [
            *(*_LEAN, "train.remat=offload", "data.packing=true"),
            *("train.gradient_accumulation_steps=4", "data.train={model}/documents.jsonl"),
        ],
        2,
    ),
    "packed_full_rows": Case(["train.remat=none", "data.packing=true"]),
    "small": Case(["train.remat=none"], 1, 256, peers={"unsloth": "none", "hf": "full"}),
}


def measure(name: str, model: str, log: Path, timeout: float, cache: Path) -> dict[str, object]:
    """Run one case through the train command and read its metrics."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        settings = [override.format(model=model) for override in case.overrides]
        settings += [f"model.name_or_path={model}", f"output.dir={scratch}/run", f"output.compile_cache={cache}"]
        settings += [f"train.batch_size={case.batch}", f"data.max_length={case.length}"]
        if not any(setting.startswith("data.train=") for setting in settings):
            settings.append(f"data.train={model}/train.jsonl")
        command = [sys.executable, "-m", "jaxtune.train", "--config", str(CONFIG)]
        command += [part for setting in settings for part in ("--set", setting)]
        started = time.perf_counter()
        with log.open("a") as file:
            status = subprocess.run(
                command, stdout=file, stderr=file, timeout=timeout, check=False, cwd=ROOT
            ).returncode
        wall = time.perf_counter() - started
        row: dict[str, object] = {"case": name, "system": "jaxtune"}
        if status != 0:
            return row | {"failed": log.read_text()[-400:]}
        records = read_metrics(Path(scratch) / "run" / "metrics.jsonl")
        settings_used = yaml.safe_load((Path(scratch) / "run" / "config.yaml").read_text())
    start = {key: value for record in records if "loss" not in record for key, value in record.items()}
    steps = [record for record in records if "loss" in record]
    timed = [record["step_seconds"] * 1e3 for record in steps[WARM_UP_STEPS:]]
    waited = [record["input_seconds"] * 1e3 for record in steps[WARM_UP_STEPS:]]
    quartiles = statistics.quantiles(timed, n=4)
    learnt = [record["tokens_per_second"] for record in steps[WARM_UP_STEPS:]]
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
        "peak_gib": _gib(steps[-1]["device_bytes"]),
        "step_gib": _gib(start["compiled_bytes"]),
        "predicted_gib": _gib(start["planned_bytes"]),
        "seconds": {
            "load": round(start["load_the_model_seconds"], 1),
            "compile": round(start["compile_the_step_seconds"], 1),
            "first_step": round(steps[0]["step_seconds"], 2),
            "wall": round(wall, 1),
        },
        "losses": [round(steps[i]["loss"], 4) for i in (0, 1, 2, 3, 4, 10) if i < len(steps)],
    }


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)


def measure_peer(name: str, system: str, python: str, model: str, log: Path, timeout: float) -> dict[str, object]:
    """The same case through a peer, in a process of its own."""
    case = CASES[name]
    command = [python, str(ROOT / "benchmarks" / "peers" / "qlora.py"), "--system", system, "--model", model]
    command += ["--checkpointing", case.peers[system], "--batch", str(case.batch), "--length", str(case.length)]
    # Unsloth writes what it compiles into the current directory.
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [*command, "--case", name], capture_output=True, text=True, timeout=timeout, check=False, cwd=scratch
        )
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return {"case": name, "system": system, "failed": done.stderr[-400:]}
    row: dict[str, object] = json.loads(lines[-1])
    return row


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
    parser.add_argument("--repeat", type=int, default=1, help="times over; compiled programs are kept from the first")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log, rows = options.out.with_suffix(".log"), []
    with tempfile.TemporaryDirectory() as cache:
        for name in [name for _ in range(options.repeat) for name in options.cases]:
            for system in options.systems:
                if system != "jaxtune" and system not in CASES[name].peers:
                    continue
                try:
                    if system == "jaxtune":
                        rows.append(measure(name, options.model, log, options.timeout, Path(cache)))
                    else:
                        arguments = options.peer_python, options.model, log, options.timeout
                        rows.append(measure_peer(name, system, *arguments))
                except subprocess.TimeoutExpired:
                    rows.append({"case": name, "system": system, "failed": f"longer than {options.timeout:.0f} s"})
                print(json.dumps(rows[-1]), flush=True)
                # Without the header, which would start a GPU client in this process while the cases are measured.
                options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    options.out.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
