"""The cases of `python -m pallas_kernels.bench --headline` through PyTorch: Unsloth's Triton kernels, bitsandbytes, and
torch itself. Rows are added to the file that the bench wrote, run on the same GPU just before.

    python benchmarks/peers/kernel_rows.py benchmarks/results/nvidia-h200/kernels.json

Needs torch and, for their systems, unsloth and bitsandbytes; JAX is not imported. Each function is compared with
float32 truth, then timed as the bench times: what the profiler saw the device busy for in a call, median over calls on
input sets that together exceed the cache. The least time that a case could take is that of the bench's own row.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, SMALL, Case, Function, Shape
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SYSTEMS = ("unsloth", "bitsandbytes", "torch")
PACKAGES = (*SYSTEMS, "unsloth_zoo", "triton", "cut_cross_entropy")
CALLS, WARM_UP, ROUNDS, CACHE_BYTES = 30, 3, 3, 200e6


def in_float32(x: Any) -> Any:
    """A floating tensor as float32, without its graph; anything else as it is."""

    return x.detach().float() if torch.is_tensor(x) and x.is_floating_point() else x


def tensors(results: Any) -> list[Any]:
    """One result or several, as a list."""
    return [x.detach() for x in (results if isinstance(results, (tuple, list)) else [results])]


def error_of(f: Function, case: Case, inputs: tuple[Any, ...]) -> float | None:
    """The largest relative error of its results in the Euclidean norm; NaN stays NaN."""

    if case.truth is None:
        f(*inputs)
        return None
    true = tensors(case.truth(*map(in_float32, inputs)))
    errors = [
        torch.linalg.vector_norm(a.float().reshape(-1) - b.reshape(-1)) / torch.linalg.vector_norm(b.float())
        for a, b in zip(tensors(f(*inputs)), true, strict=True)
    ]
    return float(torch.stack(errors).max())


def nbytes(inputs: tuple[Any, ...]) -> int:
    """Of the tensors among the inputs, and of a layer's weight."""

    parts = [x.weight.data if hasattr(x, "weight") else x for x in inputs]
    return sum(x.numel() * x.element_size() for x in parts if torch.is_tensor(x))


def measure(f: Function, case: Case, on_gpu: bool) -> dict[str, Any]:
    """us, spread_us and temp_bytes of one call."""

    calls = CALLS if on_gpu else ROUNDS
    first = case.make()
    free = torch.cuda.mem_get_info()[0] if on_gpu else 8e9
    calls = max(ROUNDS, min(calls, int(free / 4 // max(nbytes(first), 1)))) if case.once else calls
    calls -= calls % ROUNDS
    count = calls + WARM_UP if case.once else max(1, min(calls, int(CACHE_BYTES // max(nbytes(first), 1)) + 1))
    # An optimizer's state does not stand among its inputs, and exceeds the cache alone.
    count = 1 if case.truth is None else count
    sets = [first] + [case.make() for _ in range(count - 1)]
    order = (sets[i % len(sets)] for i in range(WARM_UP + calls))
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    for _ in range(WARM_UP):
        inputs = next(order)
        temporary = None
        if on_gpu:
            wait()
            torch.cuda.reset_peak_memory_stats()
        results = f(*inputs)
        if on_gpu:
            wait()
            temporary = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del results
    by_host = []
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            for _ in range(calls // ROUNDS):
                f(*next(order))
            wait()
            by_host.append((time.perf_counter() - begun) / (calls // ROUNDS) * 1e6)
    times = busy_us(profiled, calls) if on_gpu else by_host
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [0.0, 0.0, 0.0]
    return {
        "us": statistics.median(times),
        "spread_us": quartiles[2] - quartiles[0],
        "temp_bytes": temporary,
        "clock": "device" if on_gpu else "host",
    }


def busy_us(profiled: Any, calls: int) -> list[float]:
    """Microseconds of kernels and copies in each call, or their mean where calls were not alike; all on one stream."""
    spans = sorted(
        (event.time_range.start, event.time_range.end - event.time_range.start)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    durations = [duration for _, duration in spans]
    if not durations or len(durations) % calls:
        return [sum(durations) / calls]
    each = len(durations) // calls
    return [sum(durations[i : i + each]) for i in range(0, len(durations), each)]


def least(rows: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    """The bench's row of the same work, or nothing."""
    same = (
        row
        for row in rows
        if row["system"] == "pallas_kernels" and row["us"] is not None
        if (row["op"], row["case"], row["m"], row["work"]) == (case.op, case.name, case.m, case.work)
    )
    return next(same, {})


def row_of(case: Case, system: str, name: str, f: Function, ours: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """One row in the bench's form; a function that fails leaves its reason."""

    row: dict[str, Any] = dict.fromkeys(
        ("us", "spread_us", "gb_s", "tflop_s", "roofline_share", "max_rel_err", "temp_bytes", "clock", "note")
    )
    row = {"op": case.op, "case": case.name, "m": case.m, "work": case.work, "implementation": name} | row
    row["system"] = system
    try:
        row["max_rel_err"] = error_of(f, case, case.make())
        row |= measure(f, case, on_gpu)
    except Exception as failure:  # noqa: BLE001 - a peer's failure is its row
        row["note"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    else:
        for rate in ("gb_s", "tflop_s", "roofline_share"):
            if ours.get(rate) is not None:
                row[rate] = ours[rate] * ours["us"] / row["us"]
    if on_gpu:
        torch.cuda.empty_cache()
    return row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The kernel bench's cases through PyTorch.")
    parser.add_argument("rows", type=Path, help="file of python -m pallas_kernels.bench --headline --json")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=600.0, help="no further row is begun after this time")
    parser.add_argument("--small", action="store_true", help="small shapes, to try this file without a GPU")
    options = parser.parse_args()
    begun = time.perf_counter()
    result = json.loads(options.rows.read_text(encoding="utf-8"))
    kernels = None
    if "unsloth" in options.systems:
        # Both are read when it is imported.
        os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        importlib.import_module("unsloth")
        kernels = importlib.import_module("unsloth.kernels")
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    print(f"{time.perf_counter() - begun:.0f} s: imported", flush=True)
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    result["peers"] = {"versions": versions, "date": datetime.date.today().isoformat()}
    for cases in CASES:
        for case in cases(SMALL if options.small else Shape(), device, kernels):
            for (system, name), f in case.functions.items():
                if system not in options.systems:
                    continue
                if time.perf_counter() - begun > options.seconds:
                    sys.exit(f"{options.seconds:.0f} s are over: {case.op} {case.name} and what follows was not run")
                row = row_of(case, system, name, f, least(result["rows"], case), on_gpu)
                keys = ("op", "case", "m", "work", "system", "implementation")
                kept = [old for old in result["rows"] if any(old[key] != row[key] for key in keys)]
                result["rows"] = [*kept, row]
                # After each row: a run that is ended early keeps what it has measured.
                options.rows.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                shown = row["note"] or f"{row['us']:10.1f} ±{row['spread_us']:<7.1f} error {row['max_rel_err']}"
                print(
                    f"{time.perf_counter() - begun:4.0f} s {case.op:<13} {case.name:<22} {case.m} {case.work:<17}"
                    f"{system:<13} {name:<30} {shown}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
