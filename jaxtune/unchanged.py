"""Adapters that an update did not change: learnt nothing, since their gradient is zero or is lost in rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_SHOWN = 5


@jax.jit
def _sums(lora: Any) -> Any:
    def one(leaf: Array) -> Array:
        bits = lax.bitcast_convert_type(leaf, jnp.uint32 if leaf.dtype.itemsize == 4 else jnp.uint16)
        return jnp.sum(bits, axis=tuple(range(1, leaf.ndim)), dtype=jnp.uint32)

    return jax.tree.map(one, lora)


def digest(lora: Any) -> dict[str, np.ndarray]:
    """For each adapted linear a number per layer [L] from the bits of its A and B (float32 or bfloat16)."""
    linears: dict[str, np.ndarray] = {}
    for path, sums in jax.tree_util.tree_leaves_with_path(jax.device_get(_sums(lora))):
        name = jax.tree_util.keystr(path[1:-1], simple=True, separator=".")
        # The second of the two counts otherwise, so that equal changes do not cancel.
        linears[name] = sums + np.uint32(3) * linears[name] if name in linears else sums
    return linears


def unchanged(before: dict[str, np.ndarray], lora: Any) -> str | None:
    """What to say of adapters that are as they were when `before` was taken; None where all have changed."""
    same = [
        f"layer {layer} {name}" for name, now in digest(lora).items() for layer in np.flatnonzero(now == before[name])
    ]
    if not same:
        return None
    total = sum(len(layers) for layers in before.values())
    named = ", ".join(same[:_SHOWN]) + (", ..." if len(same) > _SHOWN else "")
    return (
        f"warning: the first update did not change {len(same)} of {total} adapters ({named}): their gradients are "
        "zero, or lost in rounding; check that the data has text to learn, and train.learning_rate and lora.dtype"
    )
