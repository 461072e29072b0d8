"""How long converting a random Llama takes, and what host memory it needs: one row for each form.

    python benchmarks/make_random_model.py /tmp/base --size llama3-8b
    python benchmarks/bench_convert.py /tmp/base --scratch /tmp --out benchmarks/results/nvidia-h200/convert.json

Every row is a process of its own, ended after --limit seconds, and is printed as soon as it is there. `load` quantises
bf16 to NF4 as a run does, on the device or, with the device hidden, on the host; `quantise` is that alone: of one
core's time, and over all of them. What is written goes to --scratch and is removed again.

Memory in GiB: the most that was resident, pages of mapped files included; the most that was the process's own
(RssAnon, looked at every 10 ms), and what it was before the work, with all imports done and the device started.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
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
from jaxtune.loading import load_model
from pallas_kernels import nf4

FORMS: dict[str, list[str]] = {
    "to-4bit": ["to-4bit"],
    "to-safetensors fp16": ["to-safetensors", "--dtype", "fp16"],
}
GGUF_TYPES = ("Q8_0", "Q4_K_M")
CASES = ("quantise", "load on the host", "load on the device", *FORMS, *(f"to-gguf {kind}" for kind in GGUF_TYPES))


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
    device = jax.devices()[0].device_kind if case.startswith("load") else None
    with OwnMemory() as memory:
        started = time.perf_counter()
        if device is None:
            written = round(convert_to(case, model, scratch / "converted") / 1e9, 2)
        else:
            frozen = load_model(ModelConfig(str(model), dtype="bf16"), jax.numpy.dtype("bfloat16")).frozen
            jax.block_until_ready(jax.tree.leaves(frozen))
        seconds = time.perf_counter() - started
    return {
        "case": case,
        "seconds": round(seconds, 1),
        "peak": round(resident("VmHWM"), 2),
        "own": round(memory.peak, 2),
        "own before": round(memory.before, 2),
    } | ({"GB written": written} if device is None else {"device": device})


def convert_to(case: str, model: Path, out: Path) -> int:
    """Write the form; bytes of what was written."""
    if case in FORMS:
        assert convert([*FORMS[case], str(model), "--out", str(out)]) == 0
        return sum(file.stat().st_size for file in out.rglob("*"))
    # The random model's tokenizer has no name in GGUF.
    files = open_checkpoint(model)
    read = Progress(case, len(files.infos)).watch(files.read)
    write_gguf(out, files.hf_config, files.infos, read, None, file_type=case.split()[1])
    return out.stat().st_size


def in_a_process(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case, or what became of it."""
    command = [sys.executable, __file__, str(options.model), "--scratch", str(options.scratch), "--here"]
    hidden = {} if case == "load on the device" else {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [*command, "--cases", case],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | hidden,
            timeout=options.limit,
        )
    except subprocess.TimeoutExpired:
        return {"case": case, "ended after seconds": options.limit}
    finally:
        for left in (*options.scratch.glob(".converted.*.tmp"), options.scratch / "converted"):
            shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"case": case, "failed": done.returncode}


def main() -> None:
    """Print a row for each case, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each case")
    parser.add_argument("--here", action="store_true", help="the one case in this process, as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.model, options.scratch)))
        return
    rows = []
    for case in options.cases:
        rows.append(in_a_process(case, options))
        print(rows[-1], flush=True)
        if options.out is not None:
            size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
            about = {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "model GB": round(size / 1e9, 2),
                "cores": len(os.sched_getaffinity(0)),
                "libgguf": libgguf is not None,
                "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
            }
            write_json(options.out, about | {"rows": rows}, overwrite=True)


if __name__ == "__main__":
    main()
