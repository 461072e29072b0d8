"""How long converting a random Llama takes, and what host memory it needs: one row for each form.

    python benchmarks/make_random_model.py /tmp/base --size llama3-8b
    python benchmarks/bench_convert.py /tmp/base --scratch /tmp --out benchmarks/results/nvidia-h200/convert.json

Every row is a process of its own; its peak counts the pages of mapped files that it has touched. `load` quantises bf16
to NF4 as a run does, on the device or, with the device hidden, on the host; `quantise` is that alone, in one thread, in
processor time. What is written goes to --scratch and is removed again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from convert.__main__ import main as convert
from convert.checkpoint import open_checkpoint
from convert.gguf.writer import write_gguf
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


def measure(case: str, model: Path, scratch: Path) -> dict[str, Any]:
    """Do the case in this process."""
    if case == "quantise":
        weight = np.random.default_rng(0).standard_normal((2048, 4096), np.float32).astype(ml_dtypes.bfloat16)
        nf4.quantize(weight)
        started = time.process_time()
        nf4.quantize(weight)
        seconds = time.process_time() - started
        return {"case": case, "MB/s a core": round(weight.nbytes / 1e6 / seconds)}
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if case in FORMS or case.startswith("to-gguf"):
        out = scratch / "converted"
        if case in FORMS:
            assert convert([*FORMS[case], str(model), "--out", str(out)]) == 0
        else:
            # The random model's tokenizer has no name in GGUF.
            files = open_checkpoint(model)
            write_gguf(out, files.hf_config, files.infos, files.read, None, file_type=case.split()[1])
        written = sum(file.stat().st_size for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
        more = {"GB written": round(written / 1e9, 2)}
    else:
        frozen = load_model(ModelConfig(str(model), dtype="bf16"), jax.numpy.dtype("bfloat16")).frozen
        jax.block_until_ready(jax.tree.leaves(frozen))
        more = {"device": jax.devices()[0].device_kind}
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    growth = {"peak host GiB": round(peak / 2**20, 2), "of which imports": round(before / 2**20, 2)}
    return {"case": case, "seconds": round(seconds, 1), **growth, **more}


def main() -> None:
    """Print a row for each case, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="the one case in this process, as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.model, options.scratch)))
        return
    rows = []
    for case in options.cases:
        command = [sys.executable, __file__, str(options.model), "--scratch", str(options.scratch), "--here"]
        hidden = {} if case == "load on the device" else {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [*command, "--cases", case], capture_output=True, text=True, check=False, env=os.environ | hidden
        )
        row = json.loads(done.stdout) if done.returncode == 0 else {"case": case, "failed": done.stderr[-500:]}
        print(row, flush=True)
        rows.append(row)
        converted = options.scratch / "converted"
        shutil.rmtree(converted, ignore_errors=True)
        converted.unlink(missing_ok=True)
        if options.out is not None:
            size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
            about = {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "model GB": round(size / 1e9, 2),
                "cores": len(os.sched_getaffinity(0)),
                "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
            }
            write_json(options.out, about | {"rows": rows}, overwrite=True)


if __name__ == "__main__":
    main()
