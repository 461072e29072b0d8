"""Measure generation on the device at hand and write one JSON of rows.

    python benchmarks/bench_generate.py --out benchmarks/results/nvidia-h200/generate.json

The model has the shape of Llama-3-8B, NF4 with double quantisation and an adapter of rank 16 on all seven linears, with
random weights made on the device: the time of a token does not depend on them. Each case is two processes of its own:
one compiles and compares its tokens with those that the whole model gives without a cache, the next finds the compiled
programs and is timed, so that its peak is that of weights and generation, without what the choice of kernels takes.
Times are medians of several generations after a first one; a token's time leaves out the prompt's. What is being done
goes to stderr with its seconds. `--at-once` sets all cases up beside each other, which saves minutes, and still times
one after another. `--unroll` decodes with one program for all layers, `--xla-flags` are XLA's, `--profile` adds the
kernels of a token by their time to the cases it names. `--tiny` takes a small shape and few tokens, to try the script
on a CPU.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from bench_train import header

from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.decoding import Generator
from jaxtune.device_memory import limit_memory
from jaxtune.devices import this_device
from jaxtune.health import LLAMA_3_8B, random_arrays
from jaxtune.host_embedding import with_table_on_host
from jaxtune.loading import resolve_dtype
from jaxtune.lora import adaptation, init_lora
from jaxtune.memory import device_peak, tree_bytes
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import hidden_states, logits
from jaxtune.structure import frozen_structure
from pallas_kernels.bench.timing import device_trace
from pallas_kernels.nf4 import NF4Tensor

TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LORA = LoraConfig(r=16)


@dataclasses.dataclass(frozen=True)
class Case:
    """batch: prompts at a time. prompt, new: tokens of each, and to make. head, embedding_on_host: as in `model`."""

    batch: int
    prompt: int
    new: int
    head: Literal["dtype", "int8", "nf4"] = "dtype"
    embedding_on_host: bool = False


CASES = {
    "batch-1": Case(1, 64, 256),
    "batch-16": Case(16, 64, 256),
    "prompt-2048": Case(1, 2048, 64),
    "prompt-2048-host": Case(1, 2048, 64, embedding_on_host=True),
    "prompt-2048-nf4-head": Case(1, 2048, 64, "nf4"),
    "prompt-2048-least": Case(1, 2048, 64, "nf4", embedding_on_host=True),
    "edge-512": Case(1, 448, 64, "nf4", embedding_on_host=True),
    "batch-16-prompt-2048": Case(16, 2048, 64),
}
REPEATS = 3
# Deviation of the embedding: large enough that tokens differ to the end, small enough that what came before them tells.
EMBEDDING = 8.0
CHECKED = 24


def make_generator(hf_config: dict[str, Any], case: Case, unroll: bool) -> Generator:
    """The model and its adapter, random, on the device."""
    dtype, decoder = resolve_dtype(), DecoderConfig.from_hf(hf_config)
    structure = frozen_structure(hf_config, ModelConfig("-", head=case.head), dtype)
    made: dict[str, Any] = {}
    # The large tables first, and out of the way: what drawing them takes shall not be the peak.
    for seed, part in enumerate(sorted(structure, key=lambda name: name == "layers"), start=1):
        made |= random_arrays({part: structure[part]}, seed, embedding=EMBEDDING)
        if part == "embed_tokens" and case.embedding_on_host:
            made = jax.block_until_ready(with_table_on_host(made))
    frozen = jax.tree.map(_centred, made, is_leaf=_is_packed)
    # In the dtype that products take, as `python -m jaxtune.generate` holds it.
    lora = jax.tree.map(
        lambda leaf: leaf.astype(dtype), random_arrays(jax.eval_shape(lambda: init_lora(LORA, decoder)), seed=2)
    )
    return Generator(frozen, lora, decoder, adaptation(LORA), dtype, unroll)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, NF4Tensor)


def _centred(leaf: Any) -> Any:
    """Packed weights of mean 0. NF4's values are not, and in a product of thousands that mean would outdo all else:
    every prompt would have the same answer, and comparing answers would show nothing."""
    if not _is_packed(leaf):
        return leaf
    signs = jnp.full_like(leaf.nested_absmax, 0.15), jnp.zeros_like(leaf.nested_offset)
    return dataclasses.replace(leaf, nested_absmax=signs[0], nested_offset=signs[1])


def check(generator: Generator, prompt: list[int], answer: list[int]) -> tuple[float, float]:
    """How far the tokens' logits lie below the best ones of the whole model run without a cache in float32, at most,
    and how far they may; both in units of the logits' standard deviation.

    The first is 0 but for near ties, which rounding decides: a logit may be off by 1.5 times what the whole model's own
    in the dtype of generation are off by, at the worst of its tokens, and two of them decide.
    """
    tokens = jnp.asarray([prompt + answer[:-1]], jnp.int32)

    @functools.partial(jax.jit, static_argnums=2)
    def whole(frozen: Any, lora: Any, dtype: Any) -> Any:
        hidden, _ = hidden_states(
            frozen,
            lora,
            tokens,
            jnp.arange(tokens.shape[1])[None],
            None,
            generator.decoder,
            generator.adaptation,
            dtype=dtype,
        )
        return logits(frozen, hidden[:, len(prompt) - 1 :], generator.decoder)[0]

    true, rounded = (np.asarray(whole(generator.frozen, generator.lora, d)) for d in (jnp.float32, generator.dtype))
    chosen = true[np.arange(len(answer)), answer]
    deviations = true.std(axis=1)
    below = (true.max(axis=1) - chosen) / deviations
    return float(below.max()), 2 * 1.5 * float((np.abs(rounded - true).max(axis=1) / deviations).max())


def progress(text: str, since: float) -> None:
    """One line to stderr."""
    print(f"{time.perf_counter() - since:6.1f} s  {text}", file=sys.stderr, flush=True)


def measure(name: str, parts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The parts of one case, in this process: "check" its tokens, "time" them.

    A peak is that of the process up to the end of what was timed, with what a check or compiling took before it.
    """
    begun = time.perf_counter()
    hf_config = LLAMA_3_8B | (TINY if options.tiny else {})
    case = CASES[name]
    if options.tiny:
        case = dataclasses.replace(case, new=40)
    limit_memory(None)
    # XLA's own generator compiles and draws billions of numbers faster.
    jax.config.update("jax_default_prng_impl", "rbg")
    generator = make_generator(hf_config, case, options.unroll)
    jax.block_until_ready(generator.frozen)
    progress(f"{name}: weights made", begun)
    rng = np.random.default_rng(7)
    prompts = rng.integers(0, generator.decoder.vocab_size, (case.batch, case.prompt)).tolist()

    def generation() -> tuple[float, float, list[int]]:
        """Seconds to the first tokens and of each one after them, and the first row's."""
        started = time.perf_counter()
        pieces = generator.stream(prompts, max_new_tokens=case.new)
        answer = next(pieces)[0]
        first, made = time.perf_counter(), len(answer)
        for piece in pieces:
            answer += piece[0]
        ended = time.perf_counter()
        assert len(answer) == case.new, answer
        return first - started, (ended - first) / (case.new - made), answer

    started = time.perf_counter()
    *_, answer = generation()
    first_generation = round(time.perf_counter() - started, 1)
    progress(f"{name}: first generation, with compiling or reading what was compiled", begun)
    row: dict[str, Any] = {"case": name, **dataclasses.asdict(case), "unroll": options.unroll}
    row["answer"] = answer[:CHECKED]
    if "check" in parts:
        off, allowed = check(generator, prompts[0], answer[:CHECKED])
        progress(f"{name}: checked", begun)
        row |= {
            "first_generation_s": first_generation,
            "off_best_logit": round(off, 4),
            "may_be_off": round(allowed, 4),
        }
        # A wrong cache or position is off by whole deviations; where rounding alone is, nothing can be told.
        if not off <= min(allowed + 1e-3, 1.0):
            return row | {"failed": "the tokens are not those of the whole model"}
    if "time" not in parts:
        return row
    if options.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    first, each, _ = zip(*(generation() for _ in range(REPEATS)))
    progress(f"{name}: timed", begun)
    a_token, device, peak = statistics.median(each), this_device(), device_peak()
    on_host = generator.frozen["embed_tokens"] if case.embedding_on_host else {}
    held = tree_bytes(generator.frozen) + tree_bytes(generator.lora) - tree_bytes(on_host)
    row |= {
        "compute": np.dtype(generator.dtype).name,
        "tokens_per_s": round(case.batch / a_token, 1),
        "ms_per_token": round(a_token * 1e3, 3),
        "spread_ms": round((max(each) - min(each)) * 1e3, 3),
        "ms_to_first_token": round(statistics.median(first) * 1e3, 1),
        # Every token reads all weights once but the embedding table, of which it takes one row.
        "limit_tokens_per_s": round(case.batch * device.bandwidth / (held - _idle_bytes(generator.frozen, case)), 1),
        "weights_gib": round(held / 2**30, 3),
        "peak_gib": None if peak is None else round(peak / 2**30, 3),
        "warm_first_generation_s": first_generation,
    }
    return row | ({"profile": profile(generator, prompts, case.new)} if name in options.profile else {})


def profile(generator: Generator, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Microseconds of a token by kernel, longest first, with how often each runs; and what is none of them."""
    pieces = generator.stream(prompts, max_new_tokens=new)
    for piece in pieces:
        if len(piece[0]) >= 8:
            break
    micros: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    begins, ends = [], []
    with tempfile.TemporaryDirectory() as directory:
        with device_trace(directory):
            made = len(next(pieces)[0])
        (trace,) = Path(directory).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines if "GPU" in plane.name else []:
                for event in line.events if "Stream" in line.name else []:
                    micros[event.name[:70]] += event.duration_ns / 1e3
                    launches[event.name[:70]] += 1
                    begins.append(event.start_ns)
                    ends.append(event.start_ns + event.duration_ns)
    span = (max(ends) - min(begins)) / 1e3 if ends else 0.0
    return {
        "tokens": made,
        "us_per_token": round(span / made, 1),
        "busy_us": round(sum(micros.values()) / made, 1),
        "launches": round(sum(launches.values()) / made, 1),
        "kernels": [
            {"name": name, "us": round(total / made, 2), "launches": round(launches[name] / made, 2)}
            for name, total in micros.most_common(40)
        ],
    }


def _idle_bytes(frozen: Mapping[str, Any], case: Case) -> int:
    """Of what the device holds, the embedding table where it is not the head."""
    return tree_bytes(frozen["embed_tokens"]) if "lm_head" in frozen and not case.embedding_on_host else 0


class Child:
    """One case's parts in a process of their own, which shares compiled programs with those before it."""

    def __init__(self, name: str, part: str, options: argparse.Namespace, cache: str) -> None:
        flags = [f"--{flag}" for flag in ("tiny", "unroll") if getattr(options, flag)]
        flags += ["--profile", name] if name in options.profile else []
        command = [sys.executable, __file__, "--cases", name, "--here", part, "--wait", *flags]
        kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        flags_of_xla = f"{os.environ.get('XLA_FLAGS', '')} {options.xla_flags}".strip()
        environment = os.environ | kept | {"XLA_FLAGS": flags_of_xla}
        pipe: Any = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def wait_until_ready(self) -> None:
        """Wait for what comes before timing."""
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def row(self) -> dict[str, Any]:
        """Let it go on to its end; the row that it prints last."""
        out, _ = self.process.communicate("go\n")
        if self.process.returncode:
            return {"case": self.name, "failed": f"exit status {self.process.returncode}"}
        row: dict[str, Any] = json.loads(out.splitlines()[-1])
        return row


def measure_all(names: Sequence[str], options: argparse.Namespace, cache: str) -> Iterator[dict[str, Any]]:
    """A row of each case: set up beside each other, checked, and timed one after another."""
    checking = [Child(name, "check", options, cache) for name in names]
    checked = {child.name: child.row() for child in checking}
    good = [name for name, row in checked.items() if "failed" not in row]
    yield from (row for row in checked.values() if "failed" in row)
    timing = [Child(name, "time", options, cache) for name in good]
    for child in timing:
        child.wait_until_ready()
    for child in timing:
        row = checked[child.name] | child.row()
        if "failed" not in row and row["answer"] != checked[child.name]["answer"]:
            row["failed"] = "the tokens are not those that were checked"
        yield row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure generation.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--unroll", action="store_true", help="decode with one program for all layers")
    parser.add_argument("--xla-flags", default="", help="added to XLA_FLAGS of each case")
    parser.add_argument("--profile", nargs="+", choices=CASES, default=[], help="cases: one more dispatch, by kernel")
    parser.add_argument("--at-once", action="store_true", help="set all cases up beside each other: needs their memory")
    parser.add_argument("--here", nargs="+", choices=["check", "time"], help="parts of one case in this process")
    parser.add_argument("--wait", action="store_true", help="with --here: for a line of input before timing")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.here, options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for names in [options.cases] if options.at_once else [[name] for name in options.cases]:
            for row in measure_all(names, options, cache):
                row.pop("answer", None)
                rows.append(row | ({"xla_flags": options.xla_flags} if options.xla_flags else {}))
                print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
