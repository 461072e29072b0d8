"""The adapted linear layer by its definition (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from pallas_kernels.lora_linear.projection import Projection
from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4.reference import nf4_dequantize_reference


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


def projection_reference(x: Float[Array, "*M K"], projection: Projection, scaling: float) -> Float[Array, "*M N"]:
    """One adapted layer without dropout, dense or packed, its weight and adapter in x's dtype."""
    weight = projection.weight
    if isinstance(weight, NF4Tensor):
        weight = nf4_dequantize_reference(weight, x.dtype.name)
    a, b = (v if v is None else v.astype(x.dtype) for v in (projection.lora_a, projection.lora_b))
    return lora_linear_reference(x, weight, projection.bias, a, b, scaling, None)
