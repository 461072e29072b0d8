"""How long converting a random Llama takes, and what host memory it needs: one row for each form.

    pip install "jaxtune[kquants]"
    python benchmarks/bench_convert.py /tmp/base --scratch /tmp --seconds 120 --out convert.json

The model is made where it is missing (`make_random_model.py`, Llama-3-8B's shape). Every row is a process of its own,
printed and written to --out as soon as it is there; what does not end within the --seconds of all rows says so. `load`
quantises bf16 to NF4 as a run does, on the device or, with the device hidden, on the host; `quantise` is that alone, of
one core's time, and over all of them. `to-flax` quantises on the device, writes the packed tree and loads it again.
What is written goes to --scratch, at most as much as the model has, and is removed again; a row's seconds end when it
is on the disk.

Memory in GiB: the most that was resident, pages of mapped files included; the most that was the process's own
(RssAnon, looked at every 10 ms), and what it was before the work, with all imports done and the device started.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from convert.__main__ import main as convert
from convert.checkpoint import open_checkpoint
from convert.gguf.encode import libgguf
from convert.gguf.writer import write_gguf
from convert.progress import Progress
from convert.safetensors_io import write_json
from jaxtune.config import ModelConfig
from jaxtune.environment import versions
from jaxtune.export.run import ExportConfig, export_model
from jaxtune.loading import load_model
from pallas_kernels import nf4

ON_THE_DEVICE = ("load on the device", "to-flax")
FORMS: dict[str, list[str]] = {
    "to-4bit": ["to-4bit"],
    "to-safetensors fp16": ["to-safetensors", "--dtype", "fp16"],
}
# What is asked for most comes first, since time may not reach for all.
CASES = (
    *("quantise", "load on the device", "load on the host", "to-flax", "to-4bit"),
    *("to-gguf Q4_K_M", "to-gguf Q8_0", "to-safetensors fp16"),
)
_HERE = Path(__file__).parent


def resident(field: str) -> float:
    """A line of /proc/self/status, such as VmHWM, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20


class OwnMemory:
    """The largest RssAnon while the block runs, and that at its start, in GiB."""

    def __enter__(self) -> OwnMemory:
        self.before = self.peak = resident("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, resident("RssAnon"))

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def measure(case: str, model: Path, scratch: Path) -> dict[str, Any]:
    """Do the case in this process."""
    if case == "quantise":
        weight = np.random.default_rng(0).standard_normal((16384, 4096), np.float32).astype(ml_dtypes.bfloat16)
        nf4.quantize(weight[:2048])
        megabytes, started = weight.nbytes / 1e6, time.perf_counter()
        nf4.quantize(weight)
        together = time.perf_counter() - started
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [core])
        started = time.process_time()
        nf4.quantize(weight[:2048])
        alone = (time.process_time() - started) * 8
        return {"case": case, "MB/s a core": round(megabytes / alone), "MB/s": round(megabytes / together)}
    out = scratch / "converted"
    # Starting the device is no part of the work.
    device = jax.devices()[0].device_kind
    with OwnMemory() as memory:
        started = time.perf_counter()
        if case.startswith("load"):
            load(model)
            said: dict[str, Any] = {"device": device}
        elif case == "to-flax":
            export_model(ModelConfig(str(model), dtype="bf16"), ExportConfig("flax", out, verify=False))
            said = {"device": device, "GB written": written(out)}
        else:
            convert_to(case, model, out)
            said = {"GB written": written(out)}
        seconds = time.perf_counter() - started
    row = {"case": case, "seconds": round(seconds, 1), **said}
    row |= {"peak": round(resident("VmHWM"), 2), "own": round(memory.peak, 2), "own before": round(memory.before, 2)}
    if case == "to-flax":
        started = time.perf_counter()
        load(out)
        row["seconds to load it"] = round(time.perf_counter() - started, 1)
    return row


def load(model: Path) -> None:
    """Load as a run does, to the last byte on the device."""
    frozen = load_model(ModelConfig(str(model), dtype="bf16"), jax.numpy.dtype("bfloat16")).frozen
    jax.block_until_ready(jax.tree.leaves(frozen))


def convert_to(case: str, model: Path, out: Path) -> None:
    """Write the form."""
    if case in FORMS:
        assert convert([*FORMS[case], str(model), "--out", str(out)]) == 0
        return
    # The random model's tokenizer has no name in GGUF.
    files = open_checkpoint(model)
    read = Progress(case, len(files.infos)).watch(files.read)
    write_gguf(out, files.hf_config, files.infos, read, None, file_type=case.split()[1])


def written(out: Path) -> float:
    """GB of a file, or of all in a directory."""
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e9, 2)


def in_a_process(case: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The row of a case, or what became of it."""
    command = [sys.executable, __file__, str(options.model), "--here", "--cases", case]
    # As the train command has it; else three quarters of the card are taken at once.
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if case in ON_THE_DEVICE else {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench_convert.") as scratch:
        try:
            done = subprocess.run(
                [*command, "--scratch", scratch],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                env=os.environ | settings,
                timeout=max(seconds, 1.0),
            )
        except subprocess.TimeoutExpired:
            return {"case": case, "ended after seconds": round(seconds)}
    return (
        json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"case": case, "failed": done.returncode}
    )


def main() -> None:
    """Print a row for each case, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all rows together")
    parser.add_argument("--here", action="store_true", help="the one case in this process, as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.model, options.scratch)))
        return
    if not options.model.exists():
        subprocess.run([sys.executable, _HERE / "make_random_model.py", options.model], check=True)
    rows, started = [], time.monotonic()
    for case in options.cases:
        left = options.seconds - (time.monotonic() - started)
        rows.append(in_a_process(case, options, left) if left > 0 else {"case": case, "no time left": True})
        print(rows[-1], flush=True)
        if options.out is not None:
            about = {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "model GB": round(sum(file.stat().st_size for file in options.model.glob("*.safetensors")) / 1e9, 2),
                "cores": len(os.sched_getaffinity(0)),
                "libgguf": libgguf is not None,
                "versions": versions(),
            }
            write_json(options.out, about | {"rows": rows}, overwrite=True)


if __name__ == "__main__":
    main()
