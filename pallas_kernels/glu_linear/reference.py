"""A gated unit and the adapted layer behind it by their definition."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.glu.reference import glu_reference
from pallas_kernels.lora_linear import Projection
from pallas_kernels.lora_linear.reference import projection_reference


def glu_linear_reference(
    gate_up: Float[Array, "*M F2"], projection: Projection, *, activation: str = "silu", scaling: float = 1.0
) -> Float[Array, "*M N"]:
    """The layer, without dropout, on act(gate) * up; gate_up holds both side by side."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return projection_reference(glu_reference(gate, up, activation), projection, scaling)
