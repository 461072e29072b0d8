"""One process, several GPUs: does a step over them compute what one computes, and how much faster is it?

    python benchmarks/bench_mesh.py --out mesh.json

Weights are random and made on the device. First loss and gradients of a few layers, whole and packed rows, over each
mesh of all devices: in float32 through plain XLA within 1e-5 of one device's, and in bfloat16 through the kernels with
an error (of float32's values) of at most 1.5 times one device's own. Then steps of the whole model, 4 rows for each
device that has rows of its own: medians after the second, and the bytes that the arrays and the compiled step take of a
device. Exit status 1 where numbers differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_step import MODELS, Case, random_batch, run_config
from bench_train import header

from jaxtune.config import MeshConfig
from jaxtune.device_memory import limit_memory
from jaxtune.devices import this_device
from jaxtune.health import check_mesh, random_arrays
from jaxtune.memory import tree_bytes
from jaxtune.mesh import make_parts, place, split_linears
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer
from jaxtune.step import TrainState, batch_sharding, init_state, jit_train_step, make_mesh
from jaxtune.structure import frozen_structure, state_structure, step_bytes, step_settings
from jaxtune.traffic import sent_bytes, step_collectives
from pallas_kernels._device import assume_capability

FLOAT32_LIMIT = 1e-5


@dataclasses.dataclass(frozen=True)
class Placed:
    """A compiled step and its arguments on their mesh."""

    step: Any
    state: TrainState
    frozen: Any
    batch: Any


class Model:
    """Random weights and adapters of a shape, made once, in bfloat16 but for the adapters."""

    def __init__(self, hf_config: dict[str, Any], case: Case) -> None:
        config, self.decoder = run_config(case), DecoderConfig.from_hf(hf_config)
        self.frozen = random_arrays(frozen_structure(hf_config, config.model, jnp.bfloat16), seed=1)
        self.lora = random_arrays(state_structure(config, self.decoder, jnp.bfloat16).lora, seed=2)

    def placed(self, case: Case, axes: dict[str, int], *, optimizer: Any = None, exact: bool = False) -> Placed:
        """The case's step over a mesh. optimizer: instead of the run's. exact: in float32, through plain XLA alone."""
        dtype, config, mesh = jnp.dtype(jnp.float32 if exact else jnp.bfloat16), run_config(case), make_mesh(**axes)
        optimizer = make_optimizer(config.train, 1000) if optimizer is None else optimizer
        # A copy, since the step takes its state's buffers.
        state = init_state(jax.tree.map(jnp.copy, self.lora), optimizer, 0, dtype)
        frozen = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.bfloat16 else leaf, self.frozen)
        frozen = split_linears(frozen, mesh.shape["tensor"])
        settings = step_settings(config, self.decoder, dtype, case.remat)
        if (parts := make_parts(mesh, frozen, state)) is not None:
            state, frozen = place(state, mesh, parts.state), place(frozen, mesh, parts.frozen)
        batch = jax.device_put(random_batch(case, self.decoder.vocab_size), batch_sharding(mesh))
        jitted: Any = jit_train_step(optimizer, dataclasses.replace(settings, parts=parts), mesh)
        with contextlib.ExitStack() as stack:
            if exact:
                stack.enter_context(assume_capability(None))
                stack.enter_context(jax.default_matmul_precision("highest"))
            return Placed(jitted.lower(state, frozen, batch).compile(), state, frozen, batch)

    def outcome(self, case: Case, axes: dict[str, int], *, exact: bool = False) -> list[np.ndarray]:
        """Loss, and the gradient leaf by leaf, which this optimizer keeps and does not apply."""
        keeping = optax.chain(optax.trace(0.0), optax.scale(0.0))
        placed = self.placed(case, axes, optimizer=keeping, exact=exact)
        state, scalars = placed.step(placed.state, placed.frozen, placed.batch)
        return [np.asarray(scalars["loss"]), *map(np.asarray, jax.tree.leaves(state.opt_state[0].trace))]


def error(values: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """The largest of any array, over its norm."""
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(values, truth, strict=True))


def compared(name: str, layers: int, length: int, meshes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Of each mesh, whole and packed rows: errors and their limits."""
    whole = Case("full", 2 * jax.device_count(), length, model=name, rank=16)
    model, rows = Model(MODELS[name] | {"num_hidden_layers": layers}, whole), []
    for case in (whole, dataclasses.replace(whole, packed=True)):
        truth = model.outcome(case, {}, exact=True)
        own = error(model.outcome(case, {}), truth)
        for axes in meshes:
            exact = error(model.outcome(case, axes, exact=True), truth)
            rounded = error(model.outcome(case, axes), truth)
            ok = exact <= FLOAT32_LIMIT and rounded <= 1.5 * own
            row = {"float32": exact, "limit": FLOAT32_LIMIT, "bfloat16": rounded, "of one device": own, "ok": ok}
            rows.append({"mesh": axes, "rows": "packed" if case.packed else "whole", **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def timed(model: str, remat: str, length: int, meshes: list[dict[str, int]], steps: int) -> list[dict[str, Any]]:
    """Steps of the whole model on one device and on each mesh."""
    rows: list[dict[str, Any]] = []
    weights = Model(MODELS[model], Case(remat, model=model))
    for axes in [{}, *meshes]:
        holders = axes.get("data", 1) * axes.get("fsdp", 1)
        case = Case(remat, 4 * holders, length, model=model)
        begun = time.perf_counter()
        placed = weights.placed(case, axes)
        ready, state, losses, seconds = time.perf_counter() - begun, placed.state, [], []
        held = tree_bytes((placed.frozen, state))
        for _ in range(steps):
            begun = time.perf_counter()
            state, scalars = placed.step(state, placed.frozen, placed.batch)
            losses.append(float(scalars["loss"]))
            seconds.append(time.perf_counter() - begun)
        median = statistics.median(seconds[2:] or seconds[-1:])
        config = dataclasses.replace(run_config(case), mesh=MeshConfig(**axes))  # type: ignore[arg-type]
        sent = sent_bytes(step_collectives(config, MODELS[model], jnp.dtype(jnp.bfloat16), remat), config)
        row = {
            "mesh": axes,
            "batch": case.batch,
            "length": length,
            "remat": remat,
            "ms_per_step": round(1e3 * median, 1),
        }
        row |= {"tokens_per_s": round(case.batch * length / median), "losses": [losses[0], losses[-1]]}
        row |= {"held_gib": round(held / 2**30, 3), "step_gib": round(step_bytes(placed.step) / 2**30, 3)}
        row |= {"sent_gb": {name: round(size / 1e9, 3) for name, size in sent.items()}, "ready_s": round(ready, 1)}
        if rows:
            devices = int(np.prod(list(axes.values())))
            row["of_perfect_scaling"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"] / devices, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del placed, state
    return rows


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A step over all devices of this machine, beside one of them.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    axes = ["data", "fsdp", "tensor", "sequence"]
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes)
    options = parser.parse_args()
    limit_memory(None)
    count = jax.device_count()
    if count < 2:
        parser.error("there is one device; this compares several with one")
    meshes = [{axis: count} for axis in options.axes]
    rate = check_mesh(this_device())
    print(*rate.lines, sep="\n", flush=True)
    numbers = compared(options.model, 2, max(64, options.length // 4), meshes)
    times = timed(options.model, options.remat, options.length, meshes, options.steps)
    record = header() | {"devices": count, "mesh_check": dict(rate.values), "numbers": numbers, "times": times}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
