"""Gated linear unit: the public function."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from pallas_kernels._dispatch import choose
from pallas_kernels.glu.reference import ACTIVATIONS
from pallas_kernels.glu.xla import glu_xla


def glu(
    gate: Float[Array, "*M F"],
    up: Float[Array, "*M F"],
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> Float[Array, "*M F"]:
    """activation(gate) * up: SwiGLU ("silu"), GEGLU with tanh ("gelu_tanh") or exact ("gelu").

    Args:
        gate: [..., F]. up: the same shape.
        activation: one of the three.
        implementation: "xla", or None to choose.

    Raises:
        ValueError: shapes differ, or the activation is unknown.
    """
    if gate.shape != up.shape:
        raise ValueError(f"glu: gate {gate.shape} and up {up.shape} must have one shape")
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation {activation!r} is unknown; choose one of {sorted(ACTIVATIONS)}")
    choose("glu", implementation, {"xla": lambda: None})
    return glu_xla(gate, up, activation)
