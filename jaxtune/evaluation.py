"""The loss on data that is not learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.data.dataset import Dataset


def held_out(
    sets: Mapping[str, Dataset],
    batch_size: int,
    place: Callable[[Any], Any],
    step: Callable[..., Any],
    lora: Any,
    frozen: Any,
) -> dict[str, float]:
    """The mean loss over all learnt tokens, and its exponential: of all sets together, and where there are several of
    each as `eval_loss/NAME` and `eval_perplexity/NAME`.

    place: puts a batch [1, batch_size, T] on the device. step: what `jit_eval_step` gives.
    """
    sums = {name: _sums(data, batch_size, place, step, lora, frozen) for name, data in sets.items()}
    values = _values("", sum(total for total, _ in sums.values()), sum(weight for _, weight in sums.values()))
    if len(sets) > 1:
        for name, (total, weight) in sums.items():
            values |= _values(f"/{name}", total, weight)
    return values


def _sums(
    data: Dataset, batch_size: int, place: Callable[[Any], Any], step: Callable[..., Any], lora: Any, frozen: Any
) -> tuple[float, float]:
    total = weight = 0.0
    for rows in data.eval_batches(batch_size):
        loss, count = step(lora, frozen, place({name: values[None] for name, values in rows.items()}))
        total, weight = total + float(loss), weight + float(count)
    return total, weight


def _values(suffix: str, total: float, weight: float) -> dict[str, float]:
    loss = total / weight
    # Beyond this, exp has no finite value; a loss that is not finite shows in itself.
    return {f"eval_loss{suffix}": loss, f"eval_perplexity{suffix}": math.exp(min(loss, 700.0))}
