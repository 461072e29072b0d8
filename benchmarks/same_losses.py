"""Train on a peer's own batches from its own adapters, and compare the losses with those that it had.

    python benchmarks/peers/qlora.py --system hf --model MODEL --cases losses=full:4x2048:11 --random-tokens --dump DIR
    python benchmarks/same_losses.py DIR --model MODEL --out losses.json

Steps 1 to 5 and 11 (or the last) are compared; one that is off by more than 0.005 makes the exit status 1. Nothing but
the loop's order is ours to choose: weights are read from the model's files and quantised by us, adapters and batches
are those of the directory, the settings those of the peer's script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.base import find_base
from jaxtune.config import DataConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.device_memory import limit_memory
from jaxtune.export import load_peft_adapter
from jaxtune.optim import make_optimizer
from jaxtune.step import batch_sharding, init_state, jit_train_step, make_mesh, state_sharding
from jaxtune.structure import step_settings

LIMIT = 0.005
COMPARED = (1, 2, 3, 4, 5, 11)


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One batch [1, B, T] in which, as in the peers' loss, every token but a row's first is learnt."""
    tokens = tokens[None].astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    weights[..., -1] = 0.0
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=2),
        "positions": np.broadcast_to(np.arange(tokens.shape[2], dtype=np.int32), tokens.shape),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "loss_weights": weights,
    }


def train(directory: Path, model: str, policy: Any, dtype: Any, count: int) -> list[float]:
    """The losses of our own steps."""
    batches = np.load(directory / "batches.npy")
    base = find_base(ModelConfig(model, dtype=dtype))
    lora, lora_config = load_peft_adapter(directory, decoder=base.decoder)
    config = RunConfig(
        ModelConfig(model, dtype=dtype),
        DataConfig("the batches", max_length=batches.shape[2], packing=False),
        OutputConfig("nowhere"),
        dataclasses.replace(lora_config, dtype="fp32"),
        TrainConfig(
            batch_size=batches.shape[1],
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=None,
            optim="adamw_8bit",
            remat=policy,
        ),
    )
    mesh, optimizer = make_mesh(), make_optimizer(config.train, count)
    lora = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), lora)
    state = init_state(lora, optimizer, config.train.seed, base.dtype)
    state, frozen = jax.device_put(state, state_sharding(mesh, paged=False)), base.load()
    step: Any = jit_train_step(optimizer, step_settings(config, base.decoder, base.dtype, policy), mesh)
    losses = []
    for done in range(count):
        batch = jax.device_put(batch_of(batches[done % len(batches)]), batch_sharding(mesh))
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Our losses beside a peer's, from the same adapters and batches.")
    parser.add_argument("directory", type=Path, help="what peers/qlora.py --dump wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--remat", default="full", choices=["none", "selective", "full", "offload"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="file for the row")
    options = parser.parse_args()
    limit_memory(None)
    theirs = json.loads((options.directory / "losses.json").read_text())
    ours = train(options.directory, options.model, options.remat, options.dtype, len(theirs))
    compared = sorted({min(step, len(theirs)) for step in COMPARED})
    off = [abs(ours[step - 1] - theirs[step - 1]) for step in compared]
    row = {
        "case": "losses",
        "system": "jaxtune",
        "policy": options.remat,
        "steps": compared,
        "losses": [round(ours[step - 1], 4) for step in compared],
        "peer_losses": [round(theirs[step - 1], 4) for step in compared],
        "largest_difference": round(max(off), 4),
        "limit": LIMIT,
    }
    print(json.dumps(row))
    if options.out is not None:
        options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return 0 if max(off) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
