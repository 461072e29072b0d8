"""Measure generation on the device at hand and write one JSON of rows.

    python benchmarks/bench_generate.py --out benchmarks/results/nvidia-h200/generate.json

The model has the shape of Llama-3-8B, NF4 with double quantisation and an adapter of rank 16 on all seven linears, with
random weights made on the device: the time of a token does not depend on them. Each case is a process of its own,
since JAX cannot reset its peak counter. Before it is timed, the tokens are compared with those that the whole model
gives without a cache. Times are medians of several generations after one that compiles; a token's time leaves out the
prompt's. `--unroll` decodes with one program for all layers. `--tiny` takes a small shape and few tokens, to try the
script on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_train import header

from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.decoding import Generator
from jaxtune.device_memory import limit_memory
from jaxtune.devices import this_device
from jaxtune.health import LLAMA_3_8B, random_arrays
from jaxtune.loading import resolve_dtype
from jaxtune.lora import adaptation, init_lora
from jaxtune.memory import device_peak, tree_bytes
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import hidden_states, logits
from jaxtune.structure import frozen_structure

TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LORA = LoraConfig(r=16)


@dataclasses.dataclass(frozen=True)
class Case:
    """batch: prompts at a time. prompt, new: tokens of each, and to make."""

    batch: int
    prompt: int
    new: int


CASES = {
    "batch-1": Case(1, 64, 512),
    "batch-16": Case(16, 64, 512),
    "prompt-2048": Case(1, 2048, 64),
    "batch-16-prompt-2048": Case(16, 2048, 64),
}
REPEATS = 5


def make_generator(hf_config: dict[str, Any], unroll: bool) -> Generator:
    """The model and its adapter, random, on the device."""
    dtype, decoder = resolve_dtype(), DecoderConfig.from_hf(hf_config)
    frozen = random_arrays(frozen_structure(hf_config, ModelConfig("-"), dtype), seed=1)
    lora = random_arrays(jax.eval_shape(lambda: init_lora(LORA, decoder)), seed=2)
    return Generator(frozen, lora, decoder, adaptation(LORA), dtype, unroll)


def check(generator: Generator) -> float:
    """How far the tokens' logits lie below the best ones of the whole model run without a cache, at most, in units of
    the logits' standard deviation: 0 but for near ties, which rounding decides."""
    prompt = np.random.default_rng(5).integers(0, generator.decoder.vocab_size, 100).tolist()
    (answer,) = generator.generate([prompt], max_new_tokens=24)
    tokens = jnp.asarray([prompt + answer[:-1]], jnp.int32)

    @jax.jit
    def whole(frozen: Any, lora: Any) -> Any:
        hidden, _ = hidden_states(
            frozen,
            lora,
            tokens,
            jnp.arange(tokens.shape[1])[None],
            None,
            generator.decoder,
            generator.adaptation,
            dtype=generator.dtype,
        )
        return logits(frozen, hidden[:, len(prompt) - 1 :], generator.decoder)[0]

    values = np.asarray(whole(generator.frozen, generator.lora))
    chosen = values[np.arange(len(answer)), answer]
    return float(np.max((values.max(axis=1) - chosen) / values.std(axis=1)))


def measure(name: str, tiny: bool, unroll: bool) -> dict[str, Any]:
    """One case, in this process."""
    hf_config = LLAMA_3_8B | (TINY if tiny else {})
    case = CASES[name]
    if tiny:
        case = dataclasses.replace(case, new=40)
    limit_memory(None)
    generator = make_generator(hf_config, unroll)
    jax.block_until_ready(generator.frozen)
    held = tree_bytes(generator.frozen) + tree_bytes(generator.lora)
    off = check(generator)
    row: dict[str, Any] = {"case": name, **dataclasses.asdict(case), "unroll": unroll, "off_best_logit": round(off, 4)}
    # Of bfloat16's rounding through all layers; a wrong cache or position is off by whole deviations.
    if not off < 0.2:
        return row | {"failed": "the tokens are not those of the whole model"}
    rng = np.random.default_rng(7)
    prompts = rng.integers(0, generator.decoder.vocab_size, (case.batch, case.prompt)).tolist()
    first, each = [], []
    compiled = time.perf_counter()
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        pieces = generator.stream(prompts, max_new_tokens=case.new)
        made = len(next(pieces)[0])
        prompt_done = time.perf_counter()
        rest = sum(len(piece[0]) for piece in pieces)
        ended = time.perf_counter()
        assert made + rest == case.new, (made, rest)
        if repeat == 0:
            compiled = ended - started
        else:
            first.append(prompt_done - started)
            each.append((ended - prompt_done) / rest)
    a_token, device, peak = statistics.median(each), this_device(), device_peak()
    return row | {
        "compute": np.dtype(generator.dtype).name,
        "tokens_per_s": round(case.batch / a_token, 1),
        "ms_per_token": round(a_token * 1e3, 3),
        "spread_ms": round((max(each) - min(each)) * 1e3, 3),
        "ms_to_first_token": round(statistics.median(first) * 1e3, 1),
        # Every token reads all weights once but the embedding table, of which it takes one row.
        "limit_tokens_per_s": round(case.batch * device.bandwidth / (held - _embedding_bytes(generator.frozen)), 1),
        "weights_gib": round(held / 2**30, 3),
        "peak_gib": None if peak is None else round(peak / 2**30, 3),
        "first_generation_s": round(compiled, 1),
    }


def _embedding_bytes(frozen: Mapping[str, Any]) -> int:
    return tree_bytes(frozen["embed_tokens"]) if "lm_head" in frozen else 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure generation.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--unroll", action="store_true", help="decode with one program for all layers")
    parser.add_argument("--here", action="store_true", help="one case in this process, its row to stdout")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options.tiny, options.unroll)))
        return
    rows = []
    flags = [f"--{flag}" for flag in ("tiny", "unroll") if getattr(options, flag)]
    for name in options.cases:
        command = [sys.executable, __file__, "--here", "--cases", name, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows.append({"case": name, "failed": done.stderr[-400:]} if done.returncode else json.loads(done.stdout))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
