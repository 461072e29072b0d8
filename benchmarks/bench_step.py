"""Measure the train step alone, with random weights made on the device, and write one JSON of rows.

    python benchmarks/bench_step.py --out step.json --cases balanced lean --profile profile.json

No model file is read, so that shapes of which nobody has a checkpoint at hand can be tried. Each case is a process of
its own, since JAX cannot reset its peak counter, and runs within its memory limit; it starts and imports while the case
before it runs, and then waits. A row has the plan's estimate, XLA's figure for the compiled step and the allocator's
peak. Milliseconds are medians over the steps after the second; the spread is the distance between the quartiles. The
losses of random weights are checked to be finite and to fall, and mean nothing else. A case that is named twice is
compiled anew the first time and read from the compile cache the second: its `seconds` are those of a first step.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_train import header

from jaxtune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.device_memory import limit_memory
from jaxtune.devices import this_device
from jaxtune.estimate import estimate_memory, measure_model
from jaxtune.health import LLAMA_3_8B, random_arrays
from jaxtune.host_embedding import HostEmbedding
from jaxtune.loading import resolve_dtype
from jaxtune.memory import device_peak
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer
from jaxtune.planning import make_plan
from jaxtune.step import batch_sharding, init_state, jit_train_step, make_mesh, state_sharding
from jaxtune.structure import frozen_structure, state_structure, step_bytes, step_settings
from pallas_kernels._device import assume_capability
from pallas_kernels.bench.timing import device_trace

_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_13B |= {"num_key_value_heads": 40, "vocab_size": 32000, "rope_theta": 10000.0, "max_position_embeddings": 4096}
_TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": LLAMA_3_8B | _70B,
    "llama-2-13b": LLAMA_3_8B | _13B,
    "tiny": LLAMA_3_8B | _TINY,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """batch, length: of one micro-batch. limit: memory that the process may take. packed: four documents a row.
    capability: of the GPU that implementations are chosen for, where it is not that at hand."""

    remat: str
    batch: int = 4
    length: int = 2048
    model: str = "llama-3-8b"
    rank: int = 64
    limit: str | None = None
    optim: str = "adamw_8bit"
    embedding_on_host: bool = False
    packed: bool = False
    accumulation: int = 1
    compute: str = "dtype"
    fp8_exclude: tuple[str, ...] = ()
    deterministic: bool = False
    head: str = "dtype"
    capability: float | None = None
    steps: int = 12


# Of a case, what its row says beside batch and length.
_IN_ROWS = ("model", "rank", "limit", "accumulation", "capability")
_LEAN: dict[str, Any] = {"optim": "paged_adamw_8bit", "embedding_on_host": True}
CASES = {
    "fast": Case("none"),
    "fast_deterministic": Case("none", deterministic=True),
    # What an RTX 3090 would run: no kernels of Mosaic's, no masks of documents in cuDNN.
    "fast_no_mosaic": Case("none", capability=8.6),
    "fast_fp8": Case("none", compute="fp8"),
    "fast_fp8_backward": Case("none", compute="fp8_backward"),
    # The gradients of every adapter matrix within 0.99 of float32's (docs/fp8.md).
    "fast_fp8_precise": Case("none", compute="fp8_backward", fp8_exclude=("o_proj", "down_proj")),
    "selective_fp8": Case("selective", compute="fp8"),
    "balanced_fp8": Case("offload", compute="fp8"),
    "selective": Case("auto", limit="37GiB"),
    "middle": Case("selective"),
    "full": Case("full"),
    "balanced": Case("offload"),
    "lean": Case("lean", **_LEAN),
    "lean_head_nf4": Case("lean", head="nf4", **_LEAN),
    "lean_head_int8": Case("lean", head="int8", **_LEAN),
    "long": Case("offload", 1, 8192),
    "large": Case("offload", 16),
    "packed": Case("offload", 2, packed=True, accumulation=4, steps=6, **_LEAN),
    "small": Case("none", 1, 256, steps=60),
    "context_24": Case("lean", 1, 110080, rank=32, limit="24GiB", steps=1, **_LEAN),
    "context_24_longest": Case("lean", 1, 196608, rank=32, limit="24GiB", steps=1, **_LEAN),
    "llama70b_48": Case("lean", 1, model="llama-3-70b", rank=16, limit="48GiB", steps=5, **_LEAN),
    "llama13b_24": Case("auto", 1, 1024, model="llama-2-13b", limit="24GiB"),
    "llama13b_12": Case("full", 1, 1024, model="llama-2-13b", limit="12GiB"),
    "tiny": Case("auto", 2, 64, model="tiny", rank=8, steps=5),
    "tiny_fp8": Case("auto", 2, 64, model="tiny", rank=8, compute="fp8", steps=5),
}


def run_config(case: Case) -> RunConfig:
    """The run whose step a case is; its model and data are made up."""
    remat: Any = case.remat
    optim: Any = case.optim
    compute: Any = case.compute
    head: Any = case.head
    return RunConfig(
        ModelConfig("random weights", embedding_on_host=case.embedding_on_host, head=head),
        DataConfig("random tokens", max_length=case.length, packing=case.packed),
        OutputConfig("nowhere"),
        LoraConfig(r=case.rank, lora_alpha=2 * case.rank),
        TrainConfig(
            batch_size=case.batch,
            gradient_accumulation_steps=case.accumulation,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=None,
            optim=optim,
            remat=remat,
            compute=compute,
            fp8_exclude=case.fp8_exclude,
            deterministic=case.deterministic,
        ),
    )


def random_batch(case: Case, vocabulary: int) -> dict[str, np.ndarray]:
    """Full rows of random tokens [accumulation, B, T]; packed ones of four documents of unequal length."""
    shape = case.accumulation, case.batch, case.length
    tokens = np.random.default_rng(3).integers(0, vocabulary, shape, dtype=np.int32)
    starts = [case.length * eighths // 8 for eighths in ((0, 1, 3, 4) if case.packed else (0,))]
    segments = np.searchsorted(starts, np.arange(case.length), side="right").astype(np.int32)
    positions = np.arange(case.length, dtype=np.int32) - np.asarray(starts, np.int32)[segments - 1]
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=2),
        "positions": np.broadcast_to(positions, shape).copy(),
        "segment_ids": np.broadcast_to(segments, shape).copy(),
        "loss_weights": np.ones(shape, np.float32),
    }


def measure(name: str, profile: Path | None) -> Iterator[dict[str, Any]]:
    """One case, in this process: its row, and after that the profile."""
    started = time.perf_counter()
    case = CASES[name]
    limit_memory(case.limit)
    # XLA's own generator compiles and draws billions of numbers faster.
    jax.config.update("jax_default_prng_impl", "rbg")
    config, hf_config, device, mesh = run_config(case), MODELS[case.model], this_device(), make_mesh()
    plan = make_plan(config, hf_config, device, survey=False)
    dtype, decoder = resolve_dtype(plan.dtype), DecoderConfig.from_hf(hf_config)
    whole = dataclasses.replace(config.model, embedding_on_host=False)
    frozen = random_arrays(frozen_structure(hf_config, whole, dtype), seed=1)
    host_batch = random_batch(case, decoder.vocab_size)
    batch = jax.device_put(host_batch, batch_sharding(mesh))
    if case.embedding_on_host:
        embedding = HostEmbedding(frozen)
        frozen = embedding.without_table
        batch["embedded"] = embedding.rows(host_batch["tokens"], batch_sharding(mesh))
    # Moments start at zero, as a run's do: random ones may be such as no gradients leave behind.
    optimizer = make_optimizer(config.train, 1000)
    lora = random_arrays(state_structure(config, decoder, dtype).lora, seed=2)
    state = init_state(lora, optimizer, config.train.seed, dtype)
    del lora
    state = jax.device_put(state, state_sharding(mesh, paged=config.train.is_paged))
    ready = time.perf_counter()
    with contextlib.nullcontext() if case.capability is None else assume_capability(case.capability):
        for policy in plan.candidates:
            settings = step_settings(config, decoder, dtype, policy)
            jitted: Any = jit_train_step(optimizer, settings, mesh)
            step = jitted.lower(state, frozen, batch).compile()
            if step_bytes(step) <= device.usable:
                break
    compiled = time.perf_counter()
    model = measure_model(config, hf_config, plan.dtype)
    seconds, losses = [], []
    for _ in range(case.steps):
        begun = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begun)
    if not (np.isfinite(losses).all() and losses[-1] <= losses[0]):
        yield {"case": name, "system": "jaxtune", "failed": f"losses {losses}"}
        return
    timed = [1e3 * second for second in seconds[min(2, case.steps - 1) :]]
    median = statistics.median(timed)
    spread = statistics.quantiles(timed, n=4) if len(timed) > 1 else [median] * 3
    yield {
        "case": name,
        "system": "jaxtune",
        "policy": policy,
        "compute": plan.dtype if case.compute == "dtype" else case.compute,
        "batch": case.batch,
        "seq": case.length,
        **{name: value for name, value in dataclasses.asdict(case).items() if name in _IN_ROWS and value},
        "tokens_per_s": round(plan.tokens_per_step / median * 1e3),
        "ms_per_step": round(median, 1),
        "spread_ms": round(spread[2] - spread[0], 1),
        "peak_gib": _gib(device_peak()),
        "step_gib": _gib(step_bytes(step)),
        "predicted_gib": _gib(estimate_memory(config, model, device, plan.dtype, policy).peak),
        "seconds": {
            "ready": round(ready - started, 1),
            "compile": round(compiled - ready, 1),
            "first_step": round(seconds[0], 2),
        },
    }
    if profile is not None:
        profile.write_text(json.dumps(device_time(step, state, frozen, batch), indent=1) + "\n", encoding="utf-8")


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


# Parts of kernels' names, first come first served.
KINDS = {
    "matmul": ("gemm", "nvjet", "cutlass", "cublas"),
    "attention": ("attention", "flash", "sdpa", "fmha", "cudnn"),
    "NF4 decoding": ("nf4", "decode"),
    "norms": ("rms_norm",),
    "gated unit": ("glu",),
    "rotary": ("rope",),
    "softmax of the head": ("log_sum_exp", "softmax"),
    "optimizer": ("adam",),
    "copies": ("memcpy", "copy", "concatenate", "dynamic_update_slice", "dynamic-update-slice"),
}


def device_time(step: Any, *arguments: Any) -> dict[str, Any]:
    """Milliseconds of one step by kind of kernel, and what is left of the step's time."""
    kinds: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        begun = time.perf_counter()
        with device_trace(directory):
            begun = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            total = 1e3 * (time.perf_counter() - begun)
        (trace,) = Path(directory).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    named = event.name.lower()
                    kind = next(
                        (kind for kind, parts in KINDS.items() if any(p in named for p in parts)), "elementwise"
                    )
                    kinds[kind] += event.duration_ns / 1e6
                    kernels[event.name[:80]] += event.duration_ns / 1e6
    busy = sum(kinds.values())
    return {
        "ms": {kind: round(value, 1) for kind, value in kinds.most_common()},
        "busy_ms": round(busy, 1),
        "step_ms": round(total, 1),
        "idle_ms": round(total - busy, 1),
        "longest_kernels_ms": {name: round(value, 1) for name, value in kernels.most_common(25)},
    }


def _start(name: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """The process of one case, which imports and then waits for a line."""
    command = [sys.executable, __file__, "--alone", "--cases", name, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _row_of(process: subprocess.Popen[str], name: str, timeout: float) -> dict[str, Any]:
    """Let a process go on: the row that it prints, whatever becomes of it then; or why there is none."""
    try:
        printed, errors = process.communicate("\n", timeout)
        failed = errors[-400:]
    except subprocess.TimeoutExpired:
        process.kill()
        printed, failed = process.communicate()[0], f"longer than {timeout:.0f} s"
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return rows[0] if rows else {"case": name, "system": "jaxtune", "failed": failed}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the train step alone, with random weights.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), default=[name for name in CASES if not name.startswith("tiny")]
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case")
    parser.add_argument("--profile", type=Path, help="device time of one more step by kind of kernel; with one case")
    parser.add_argument("--alone", action="store_true", help="in this process, printed, when a line has been read")
    parser.add_argument("--compile-cache", help="directory of compiled programs; not given, one for this call")
    options = parser.parse_args()
    if options.profile is not None and len(options.cases) > 1:
        parser.error("--profile takes one case")
    if options.alone:
        if not sys.stdin.readline():
            return
        jax.config.update("jax_compilation_cache_dir", options.compile_cache)
        for row in measure(options.cases[0], options.profile):
            print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as own_cache:
        arguments = ["--out", str(options.out), "--compile-cache", options.compile_cache or own_cache]
        arguments += ["--profile", str(options.profile)] if options.profile else []
        process = _start(options.cases[0], arguments)
        for name, following in zip(options.cases, [*options.cases[1:], None]):
            waiting = None if following is None else _start(following, arguments)
            rows.append(_row_of(process, name, options.timeout))
            print(json.dumps(rows[-1]), flush=True)
            # Without the header, which would start a GPU client in this process while the cases are measured.
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
            process = waiting or process
    options.out.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
