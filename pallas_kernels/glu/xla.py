"""Gated linear units through XLA, keeping only their two inputs for the backward pass.

Why it exists: differentiating the definition keeps up to five arrays of the MLP's width; the activation and its slope
cost less to compute again than to read back. Numerics: as the reference, backward in float32, rounded once.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array

from pallas_kernels.glu.reference import glu_reference


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def glu_xla(gate: Array, up: Array, activation: str) -> Array:
    """See `pallas_kernels.glu.api.glu`."""
    return glu_reference(gate, up, activation)


def _fwd(gate: Array, up: Array, activation: str) -> tuple[Array, tuple[Array, Array]]:
    return glu_reference(gate, up, activation), (gate, up)


def _bwd(activation: str, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    _, pullback = jax.vjp(partial(glu_reference, activation=activation), *residuals)
    return pullback(dy)


glu_xla.defvjp(_fwd, _bwd)
