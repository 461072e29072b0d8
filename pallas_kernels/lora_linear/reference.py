"""The adapted linear layer by its definition (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float


def lora_linear_reference(
    x: Float[Array, "*M K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, N] | None,
    lora_a: Float[Array, "R K"] | None,
    lora_b: Float[Array, "N R"] | None,
    scaling: float,
    keep: Float[Array, "*M K"] | None,
) -> Float[Array, "*M N"]:
    """x W^T + bias + scaling * ((x * keep) A^T) B^T; `keep` is dropout's mask divided by its keeping probability."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if lora_a is not None and lora_b is not None:
        dropped = x if keep is None else x * keep
        y = y + scaling * ((dropped @ lora_a.T) @ lora_b.T)
    return y
