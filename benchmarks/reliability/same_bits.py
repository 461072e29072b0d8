"""The same run three times, each in a process of its own: are the bits the same?

    python benchmarks/reliability/same_bits.py
    python benchmarks/reliability/same_bits.py --shape llama3-8b --steps 10 --batch 2 --length 1024 \
        --set train.deterministic=true      # on a GPU

The second run finds the first one's compiled programs, as any run does on a machine where such a run has been; the
third compiles its own, for which XLA on a GPU times algorithms anew. Compared are the adapter's file, every array of
the last checkpoint (adapter, optimizer, random state) and all metrics but those of time and memory. Exit status 1 where
the second run differs from the first; whether the third one does is printed. The first has the device for itself, and
its time is told; the others run side by side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

import jax  # noqa: E402
from compared import computed, saved_state  # noqa: E402
from soak import Watch, make_config, soak  # noqa: E402

from jaxtune.config_io import dump_yaml, load_config  # noqa: E402
from jaxtune.device_memory import limit_memory  # noqa: E402
from jaxtune.metrics import read_metrics  # noqa: E402

# The directory of each run's compiled programs.
RUNS = {"first": "compiled", "with its programs": "compiled", "compiled anew": "compiled-anew"}


def start(directory: Path, run: str) -> subprocess.Popen[str]:
    """One of the runs, in a process of its own."""
    command = [sys.executable, __file__, "--directory", str(directory), "--run", run]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def differences(run: Path, first: Path, steps: int) -> tuple[list[str], int]:
    """What is not the same to the bit, and how many bits were compared."""
    files = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (run, first)]
    states = [saved_state(path, steps) for path in (run, first)]
    found, records = [], [computed(path) for path in (run, first)]
    for ours, theirs in zip(*records, strict=True):
        if ours != theirs:
            found.append(f"metrics from step {ours['step']} on (loss {ours.get('loss')}, not {theirs.get('loss')})")
            break
    found += [] if files[0] == files[1] else ["the adapter's file"]
    found += [name for name, array in states[1].items() if states[0][name].tobytes() != array.tobytes()]
    return found, 8 * (len(files[1]) + sum(array.nbytes for array in states[1].values()))


def step_seconds(run: Path) -> float:
    """The median of its steps after the third; of fewer, the last one."""
    seconds = [record["step_seconds"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    return statistics.median(seconds[3:] or seconds[-1:])


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="The same run three times, compared to the bit.")
    parser.add_argument("--shape", choices=("tiny", "llama3-8b"), default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--packed", action="store_true", help="rows of several documents")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run's configuration")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        limit_memory(None)
        config = load_config(options.directory / "run.yaml", [f"output.dir={options.directory / options.run}"])
        jax.config.update("jax_compilation_cache_dir", str(options.directory / RUNS[options.run]))
        soak(config, Watch(1), resume=False)
        return 0

    with tempfile.TemporaryDirectory() as name:
        directory, started = Path(name), time.perf_counter()
        sizes = options.shape, options.steps, options.batch, options.length
        config, file = (
            make_config(directory, *sizes, layers=options.layers, packed=options.packed),
            directory / "run.yaml",
        )
        file.write_text(dump_yaml(config))
        file.write_text(dump_yaml(load_config(file, ["output.save_steps=null", *options.set])))
        first, *others = RUNS
        for together in ([first], others):
            for process in [start(directory, run) for run in together]:
                said, _ = process.communicate()
                if process.returncode != 0:
                    print(said)
                    return 1
        print(f"{len(RUNS)} runs of {options.steps} steps: {time.perf_counter() - started:.0f} s")
        print(f"a step of the first one: {1e3 * step_seconds(directory / first):.1f} ms, the median after the third")
        differing = {}
        for run in others:
            differing[run], bits = differences(directory / run, directory / first, options.steps)
            several = differing[run][:3] + [f"and {len(differing[run]) - 3} more"] * (len(differing[run]) > 3)
            print(f"{run}: {', '.join(several) or 'nothing'} differs in {bits:,} bits compared")
    return 1 if differing[others[0]] else 0


if __name__ == "__main__":
    sys.exit(main())
