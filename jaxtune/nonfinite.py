"""Updates whose loss or gradient is not finite: never applied, traced to where it began, and their batch kept.

Looking for the layer compiles programs of its own, and happens only then: a healthy run does not know of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtune.checkpoint import Checkpoints
from jaxtune.errors import UserError
from jaxtune.metrics import read_metrics
from jaxtune.parts import AXES
from jaxtune.processes import agreed, is_first, largest_each, several
from jaxtune.step import StepConfig, TrainState, batch_loss, batch_spec, micro_batch

# Updates passed over one after another, at which a run stops all the same; batches that are kept.
MOST_IN_A_ROW = 10
KEPT = 3

HostBatch = Mapping[str, np.ndarray]
Place = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A batch run again, layer by layer.

    where: what was not finite first. losses: of each micro-batch, summed over its tokens. sizes: [L + 1] of each
    micro-batch, the largest magnitude in the embedded tokens and in each layer's output, NaN where any is not finite.
    """

    where: str
    losses: tuple[float, ...]
    sizes: tuple[np.ndarray, ...]


class NonfiniteUpdates:
    """What a run does about updates that are not finite."""

    def __init__(
        self, policy: Literal["stop", "skip"], run: Path, trace: Callable[[HostBatch, TrainState], Traced], place: Place
    ) -> None:
        """policy: `train.on_nonfinite`. run: its directory. trace: `trace` for the run's weights. place: puts a batch
        on the devices."""
        self.policy, self.run, self._trace, self._place = policy, run, trace, place
        metrics = run / "metrics.jsonl"
        self._in_a_row = agreed(skips_at_the_end(read_metrics(metrics)) if metrics.is_file() and is_first() else 0)

    def met(self, step: int, values: Mapping[str, float], batch: HostBatch, state: TrainState) -> str | None:
        """Look at an update's values; where they are not finite, keep the batch.

        state: after the update, with adapter and optimizer as they were before it.

        Returns:
            None for a finite update, else a sentence that says what happened.

        Raises:
            UserError: it is not finite, and the policy is to stop, or too many in a row were passed over.
        """
        bad = not_finite(values)
        if not bad:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        where = self._trace(batch, state).where
        meta = {"values": {name: str(values[name]) for name in bad}, "where": where}
        # Of several processes each has rows of its own, and writes these.
        keep_batch(self.run, step, self._place(batch) if several() else batch, state, meta)
        happened = (
            f"step {step}: {' and '.join(bad)} not finite, first {where}; the update is not applied. "
            f"`python -m jaxtune.replay --run {self.run} --step {step}` runs the batch again"
        )
        if self.policy == "stop":
            raise UserError(
                f"{happened}. Lower train.learning_rate, or continue without such batches: --resume auto --set "
                "train.on_nonfinite=skip"
            )
        if self._in_a_row >= MOST_IN_A_ROW:
            raise UserError(f"{happened}. It is the {MOST_IN_A_ROW}th in a row. Lower train.learning_rate")
        return happened


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Which of an update's loss and grad_norm are not finite.

    While the loss scale of float16 is sought, above 1, a gradient may overflow: such an update is the search's own.
    """
    names = ("loss",) if values.get("loss_scale", 1.0) > 1.0 else ("loss", "grad_norm")
    return [name for name in names if not math.isfinite(values[name])]


def skips_at_the_end(records: list[dict[str, Any]]) -> int:
    """How many of the last updates in a run's metrics were passed over."""
    updates = [record for record in records if "loss" in record]
    finite = [index for index, record in enumerate(updates) if not record.get("skipped")]
    return len(updates) - 1 - finite[-1] if finite else len(updates)


def keep_batch(run: Path, step: int, batch: Any, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Write what running an update again takes to `nonfinite/STEP` in the run's directory; the last few are kept."""
    Checkpoints(run / "nonfinite", keep_last=KEPT).save(step, replayable(batch, state), meta)


def replayable(batch: Any, state: TrainState) -> dict[str, Any]:
    """The arrays of an update that is to be run again, or their structure."""
    return {"batch": dict(batch), "step": state.step, "lora": state.lora, "rng": state.rng}


def trace(
    batch: HostBatch,
    state: TrainState,
    *,
    frozen: Any,
    config: StepConfig,
    mesh: Mesh,
    place: Place,
) -> Traced:
    """Run a batch [accumulation, B, T] again and say where it first is not finite: forward, then backward.

    state: after the update, its adapter as before it. place: puts a batch on the device. The layer is the first in the
    order of computation, and a gradient's the last, since the backward pass begins there.
    """
    seen: dict[int, float] = {}
    forward, backward = _programs(config, mesh, seen)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step - 1)
    where, losses, sizes = None, [], []
    count = len(batch["tokens"])
    for index in range(count):
        micro = place({name: values[index : index + 1] for name, values in batch.items()})
        micro_key = np.asarray(jax.random.key_data(jax.random.fold_in(key, index)))
        seen.clear()
        losses.append(float(forward(state.lora, frozen, micro, micro_key)))
        jax.effects_barrier()
        sizes.append(largest_each(np.asarray([seen[place] for place in range(config.decoder.num_layers + 1)])))
        found = _forward_place(sizes[-1], losses[-1])
        if found is None and where is None:
            found = _backward_place(jax.device_get(backward(state.lora, frozen, micro, micro_key)))
        if found is not None and where is None:
            where = found + (f" of micro-batch {index}" if count > 1 else "")
    return Traced(where or "nowhere, run again layer by layer", tuple(losses), tuple(sizes))


def _programs(config: StepConfig, mesh: Mesh, seen: dict[int, float]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The loss with a look at every layer's output, and which gradients are finite, for one micro-batch."""

    def note(index: Array, size: Array) -> None:
        seen[int(index)] = float(np.maximum(seen.get(int(index), 0.0), size))

    def observe(layer: Callable[..., Any]) -> Callable[..., Any]:
        def observed(carry: Any, inputs: Any) -> Any:
            index = inputs[1]
            out, rest = layer(carry, inputs)
            for at, x in ((index, carry[0]), (index + 1, out[0])):
                # On a CPU the largest of values with NaN among them need not be NaN.
                size = jnp.where(jnp.isfinite(x).all(), jnp.max(jnp.abs(x)).astype(jnp.float32), jnp.nan)
                jax.debug.callback(note, at, size)
            return out, rest

        return observed

    def loss(lora: Any, frozen: Any, batch: Any, key: Any, **options: Any) -> Array:
        rows = micro_batch(batch, 0)
        dropout = jax.random.wrap_key_data(key) if config.adaptation.dropout_rate > 0 else None
        return batch_loss(lora, frozen, rows, config, dropout, **options)

    def forward(*arguments: Any) -> Array:
        total = loss(*arguments, wrap=observe)
        return total if config.parts is None else config.parts.sums(total)

    def backward(*arguments: Any) -> Any:
        gradient = jax.grad(loss)(*arguments)
        flags = jax.tree.map(lambda g: jnp.isfinite(g).all(axis=tuple(range(1, g.ndim))).astype(jnp.int32), gradient)
        return flags if config.parts is None else lax.pmin(flags, AXES)

    if (parts := config.parts) is None:
        return jax.jit(forward), jax.jit(backward)
    specs = parts.state.lora, parts.frozen, batch_spec(), P()
    shard = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(shard(forward)), jax.jit(shard(backward))


def _forward_place(sizes: np.ndarray, loss: float) -> str | None:
    bad = np.flatnonzero(~np.isfinite(sizes))
    if bad.size:
        return "in the embedded tokens" if bad[0] == 0 else f"in the output of layer {bad[0] - 1}"
    return None if math.isfinite(loss) else "in the head and the loss"


def _backward_place(flags: Any) -> str | None:
    named = {
        jax.tree_util.keystr(path[1:], simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(flags)
    }
    bad = [int(layer) for leaf in named.values() for layer in np.flatnonzero(leaf == 0)]
    if not bad:
        return None
    names = ", ".join(name for name, leaf in named.items() if leaf[max(bad)] == 0)
    return f"in the gradients of layer {max(bad)} ({names})"
