"""Gated linear unit: the public functions."""

from __future__ import annotations

from functools import partial

import jax
from jax import Array
from jaxtyping import Float

from pallas_kernels._dispatch import choose
from pallas_kernels.glu import triton
from pallas_kernels.glu.reference import ACTIVATIONS
from pallas_kernels.glu.triton import glu_backward_triton, glu_forward_triton
from pallas_kernels.glu.xla import glu_backward_xla, glu_forward_xla

# [M, F] gate and [M, F] up, or one [M, 2F] that holds both beside each other.
Operands = tuple[Array, ...]

_FORWARD = {"triton": glu_forward_triton, "xla": glu_forward_xla}
_BACKWARD = {"triton": glu_backward_triton, "xla": glu_backward_xla}


def glu(
    gate: Float[Array, "*M F"],
    up: Float[Array, "*M F"],
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> Float[Array, "*M F"]:
    """activation(gate) * up: SwiGLU ("silu"), GEGLU with tanh ("gelu_tanh") or exact ("gelu").

    Differentiable in both; the backward pass keeps nothing but them, and through Triton writes its results over them.

    Args:
        gate: [..., F]. up: the same shape.
        activation: one of the three.
        implementation: "triton", "xla", or None to choose.

    Returns:
        [..., F] in gate's dtype.

    Raises:
        ValueError: shapes differ, or the activation or the implementation's name is unknown.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    if gate.shape != up.shape:
        raise ValueError(f"glu: gate {gate.shape} and up {up.shape} must have one shape")
    _check(activation)
    chosen = _choose(implementation, gate, up)
    width = gate.shape[-1]
    return _glu(gate.reshape(-1, width), up.reshape(-1, width), activation, chosen).reshape(gate.shape)


def glu_forward(
    operands: Operands, *, activation: str = "silu", tail: int = 0, implementation: str | None = None
) -> Float[Array, "M F_plus_tail"]:
    """activation(gate) * up into an array with `tail` more columns, which are zero; no gradient rule of its own.

    Args:
        operands: (gate, up), [M, F] each, or (gate_up,), [M, 2F].
        activation, implementation: as in `glu`.
        tail: columns to leave room for, behind the unit's own.

    Returns:
        [M, F + tail] in gate's dtype.
    """
    _check(activation)
    return _FORWARD[_choose(implementation, *operands)](operands, activation, tail)


def glu_backward(
    dh: Float[Array, "M F_or_wider"],
    operands: Operands,
    *,
    activation: str = "silu",
    with_h: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "M F_or_wider"] | None, Operands]:
    """The gradient of `glu_forward`; through Triton each result is written over the input in its place.

    Args:
        dh: [M, F] or wider: columns beyond F are not read.
        operands: as in `glu_forward`.
        activation, implementation: as in `glu`.
        with_h: make the unit itself again, for the gradient of what multiplied it.

    Returns:
        dh with its first F columns replaced by the unit itself (None without `with_h`), and the gradients of the
        operands, in their form.
    """
    _check(activation)
    return _BACKWARD[_choose(implementation, dh, *operands)](dh, operands, activation, with_h)


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation {activation!r} is unknown; choose one of {sorted(ACTIVATIONS)}")


def _choose(implementation: str | None, *arrays: Array) -> str:
    return choose("glu", implementation, {"triton": lambda: triton.unsupported_reason(*arrays), "xla": lambda: None})


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _glu(gate: Array, up: Array, activation: str, implementation: str) -> Array:
    return _FORWARD[implementation]((gate, up), activation, 0)


def _fwd(gate: Array, up: Array, activation: str, implementation: str) -> tuple[Array, Operands]:
    return _glu(gate, up, activation, implementation), (gate, up)


def _bwd(activation: str, implementation: str, residuals: Operands, dh: Array) -> Operands:
    return _BACKWARD[implementation](dh, residuals, activation, False)[1]


_glu.defvjp(_fwd, _bwd)
