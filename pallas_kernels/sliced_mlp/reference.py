"""A norm and the adapted MLP behind it by their definition."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from pallas_kernels.glu_linear.reference import glu_linear_reference
from pallas_kernels.lora_linear import Projection
from pallas_kernels.norm_linear.reference import norm_linear_reference


def sliced_mlp_reference(
    x: Float[Array, "*M D"],
    scale: Float[Array, " D"],
    mlp: tuple[Projection, Projection, Projection],
    *,
    activation: str = "silu",
    eps: float = 1e-6,
    scaling: float = 1.0,
) -> Float[Array, "*M D"]:
    """Gate, up and down, without dropout, on the normalised x."""
    gate_up, _ = norm_linear_reference(x, scale, mlp[:2], eps=eps, scaling=scaling)
    return glu_linear_reference(gate_up, mlp[2], activation=activation, scaling=scaling)
