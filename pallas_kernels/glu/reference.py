"""Gated linear units by their definition (arXiv:2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def glu_reference(gate: Float[Array, "*M F"], up: Float[Array, "*M F"], activation: str) -> Float[Array, "*M F"]:
    """activation(gate) * up, computed in float32 and rounded once to gate's dtype."""
    return (ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
