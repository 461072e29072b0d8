"""The loss on data that is not learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.data.loader import Dataset


def held_out_loss(
    data: Dataset, batch_size: int, place: Callable[[Any], Any], step: Callable[..., Any], lora: Any, frozen: Any
) -> float:
    """The mean loss over all learnt tokens of a set.

    place: puts a batch [1, batch_size, T] on the device. step: what `jit_eval_step` gives.
    """
    total = weight = 0.0
    for rows in data.eval_batches(batch_size):
        loss, count = step(lora, frozen, place({name: values[None] for name, values in rows.items()}))
        total, weight = total + float(loss), weight + float(count)
    return total / weight
