"""Gated linear units through XLA, keeping only their two inputs for the backward pass.

Why it exists: differentiating the definition keeps up to five arrays of the MLP's width; the activation and its slope
cost less to compute again than to read back. Numerics: as the reference, backward in float32, rounded once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.glu.reference import glu_reference


def glu_forward_xla(operands: tuple[Array, ...], activation: str, tail: int) -> Array:
    """See `pallas_kernels.glu.api.glu_forward`."""
    h = glu_reference(*_halves(operands), activation)
    return jnp.pad(h, ((0, 0), (0, tail))) if tail else h


def glu_backward_xla(
    dh: Array, operands: tuple[Array, ...], activation: str, with_h: bool
) -> tuple[Array | None, tuple[Array, ...]]:
    """See `pallas_kernels.glu.api.glu_backward`."""
    gate, up = _halves(operands)
    width = gate.shape[1]
    h, pullback = jax.vjp(partial(glu_reference, activation=activation), gate, up)
    gradients = pullback(dh[:, :width].astype(h.dtype))
    if len(operands) == 1:
        gradients = (jnp.concatenate(gradients, axis=1),)
    return (jnp.concatenate([h, dh[:, width:]], axis=1) if with_h else None), gradients


def _halves(operands: tuple[Array, ...]) -> tuple[Array, Array]:
    gate, up = operands if len(operands) == 2 else jnp.split(operands[0], 2, axis=1)
    return gate, up
