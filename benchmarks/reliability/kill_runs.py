"""Kill a small run at random moments until it has had enough, and compare its end with that of an undisturbed one.

    python benchmarks/reliability/kill_runs.py --kills 60

A tiny Llama with text of its own is tuned for some steps, saving after each. Each start gets SIGKILL after a random
time (imports, compilation, steps, saves) and is started again with `--resume auto`; the last one may end. Then adapter,
optimizer state, metrics and order of the data must equal, bit for bit, those of a run that nobody disturbed. Prints
what the kills hit; exit status 1 where a bit differs or a start fails otherwise than by the kill.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from compared import computed, saved_state  # noqa: E402
from runs import COLOURS, RUN, question, save_model, save_records  # noqa: E402

from jaxtune.checkpoint import Checkpoints  # noqa: E402


def write_run(directory: Path, steps: int) -> Path:
    """Model, data and configuration; returns the configuration's path."""
    (directory / "model").mkdir()
    model = save_model(directory / "model")
    things = list(COLOURS)
    train = save_records(directory / "train.jsonl", [question(thing) for thing in things] * 3)
    held_out = save_records(directory / "eval.jsonl", [question(thing) for thing in things[:3]])
    run: dict[str, dict[str, Any]] = {section: dict(values) for section, values in RUN.items()}
    run["model"]["name_or_path"] = str(model)
    run["data"] |= {"train": str(train), "eval": str(held_out)}
    run["train"] |= {"max_steps": steps, "eval_steps": max(1, steps // 4)}
    run["output"] |= {"save_steps": 1, "compile_cache": str(directory / "compiled")}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def command(config: Path, output: Path) -> list[str]:
    """One start of the run."""
    return [
        *(sys.executable, "-m", "jaxtune.train", "--config", str(config)),
        *("--set", f"output.dir={output}", "--resume", "auto"),
    ]


def differences(output: Path, undisturbed: Path, steps: int) -> list[str]:
    """What of the two runs' ends is not the same to the bit."""
    found = []
    adapters = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (output, undisturbed)]
    if adapters[0] != adapters[1]:
        found.append("adapter")
    records = [
        json.loads((path / "checkpoints" / str(steps) / "meta.json").read_text())["record"]
        for path in (output, undisturbed)
    ]
    for path in (output, undisturbed):
        Checkpoints(path / "checkpoints").verify(steps)
    states = [
        {array_name: array.tobytes() for array_name, array in saved_state(path, steps).items()}
        for path in (output, undisturbed)
    ]
    found += [array_name for array_name in states[1] if states[0].get(array_name) != states[1][array_name]]
    if records[0]["meta"]["data_position"] != records[1]["meta"]["data_position"]:
        found.append("position in the data")
    if computed(output) != computed(undisturbed):
        found.append("metrics")
    return found


def moment(output: Path) -> str:
    """Where a killed run was, from what it left."""
    checkpoints = output / "checkpoints"
    if list(checkpoints.glob(".tmp-*")):
        return "during a save"
    if not (output / "metrics.jsonl").is_file():
        return "before the first step"
    return "between saves" if Checkpoints(checkpoints).steps() else "before the first save"


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill a small run at random moments and compare its end.")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    rng, hit, kills = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = write_run(directory, options.steps)
        # The second time with compiled programs at hand, as every start that is killed.
        for undisturbed in ("first", "whole"):
            started = time.perf_counter()
            done = subprocess.run(command(config, directory / undisturbed), cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stderr)
                return 1
            longest = time.perf_counter() - started
        print(f"seed {options.seed}; undisturbed: {options.steps} steps in {longest:.0f} s", flush=True)
        if differing := differences(directory / "first", directory / "whole", options.steps):
            print(f"two undisturbed runs are not the same: {', '.join(differing)}")
            return 1
        runs = 0
        while kills < options.kills:
            runs += 1
            output = directory / f"run{runs}"
            ended, begun, killed = False, time.perf_counter(), False
            while not ended:
                with (directory / "log.txt").open("w") as log:
                    process = subprocess.Popen(command(config, output), cwd=ROOT, stdout=log, stderr=log)
                    try:
                        # Once the kills are done the last start may go on to its end.
                        process.wait(rng.uniform(0, longest) if kills < options.kills else None)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                if process.returncode == -signal.SIGKILL:
                    kills, killed = kills + 1, True
                    hit[moment(output)] += 1
                elif process.returncode == 0:
                    ended = True
                    if not killed:
                        # The machine may be busier or idler than it was.
                        longest = time.perf_counter() - begun
                else:
                    print((directory / "log.txt").read_text()[-2000:])
                    return 1
            if differing := differences(output, directory / "whole", options.steps):
                print(f"run {runs}, after {kills} kills: not the same: {', '.join(differing)}")
                return 1
            print(f"run {runs} ended the same to the bit; {kills} kills so far: {dict(hit)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
