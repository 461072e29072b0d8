"""The seam: every linear layer of a model is one call here, dense or NF4, with or without an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jaxtyping import Float

from pallas_kernels.lora_linear import lora_linear


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How adapters act: `scaling` on B A, and the dropout `rate` on their input."""

    scaling: float = 1.0
    dropout_rate: float = 0.0


def linear(
    x: Float[Array, "*M K"],
    base: Mapping[str, Any],
    adapter: Mapping[str, Array] | None,
    adaptation: Adaptation,
    dropout_key: Array | None,
) -> Float[Array, "*M N"]:
    """Apply the linear layer `base` ({"kernel": [N, K] or NF4Tensor, "bias": [N] if any}) and its adapter to x.

    Args:
        x: [..., K], in the compute dtype.
        adapter: {"lora_A": [R, K], "lora_B": [N, R]}, or None where the layer is not adapted.
        dropout_key: of this layer in this step; None switches dropout off (evaluation).
    """
    adapter = adapter or {}
    return lora_linear(
        x,
        base["kernel"],
        base.get("bias"),
        adapter.get("lora_A"),
        adapter.get("lora_B"),
        scaling=adaptation.scaling,
        dropout_rate=0.0 if dropout_key is None else adaptation.dropout_rate,
        dropout_key=dropout_key,
    )


def split_key(key: Array | None, index: int) -> Array | None:
    """A key of its own for each of several layers that share `key`; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)
