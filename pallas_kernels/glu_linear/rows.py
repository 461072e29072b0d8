"""The kernels around glu_linear's product: the gated unit into a padded operand, and its backward pass in place.

Why they exist: the product wants its operand with room for the adapter's columns; and the backward pass, which needs
the gated unit itself again for lora_a's gradient, writes its three results over its three inputs, so that nothing of
the MLP's width is allocated. Arithmetic in float32, each result rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import triton_call

_TILE = 2048
_WARPS = 4
_WHOLE = pl.BlockSpec(memory_space=pl.ANY)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _activation(x: Array, activation: str) -> tuple[Array, Array]:
    """The activation's value and slope at x."""
    if activation == "silu":
        s = _sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    # tanh(u) = 2 sigmoid(2u) - 1, which Triton has the parts of.
    assert activation == "gelu_tanh", activation
    u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    tanh = 2.0 * _sigmoid(2.0 * u) - 1.0
    slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * _SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1.0 + tanh), slope


def unsupported_reason(activation: str) -> str | None:
    """Why the kernels cannot compute this activation, or None."""
    return "Triton's lowering has no error function" if activation == "gelu" else None


def glu_forward(gate_up: Array, activation: str, tail: int) -> Array:
    """activation(gate) * up of [M, 2F], as [M, F + tail] with a tail of zeros."""
    m, width = gate_up.shape[0], gate_up.shape[1] // 2

    def kernel(gate_up_ref: Any, out_ref: Any) -> None:
        row, start = pl.program_id(0), pl.program_id(1) * _TILE
        column = start + lax.broadcasted_iota(jnp.int32, (_TILE,), 0)
        inside = column < width
        gate = plt.load(gate_up_ref.at[row, pl.ds(start, _TILE)], mask=inside, other=0.0).astype(jnp.float32)
        up = plt.load(gate_up_ref.at[row, pl.ds(width + start, _TILE)], mask=inside, other=0.0).astype(jnp.float32)
        value = jnp.where(inside, _activation(gate, activation)[0] * up, 0.0)
        plt.store(out_ref.at[row, pl.ds(start, _TILE)], value.astype(gate_up.dtype), mask=column < width + tail)

    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, width + tail), gate_up.dtype),
        grid=(m, -(-(width + tail) // _TILE)),
        in_specs=[_WHOLE],
        out_specs=_WHOLE,
        num_warps=_WARPS,
        name="glu_forward",
    )(gate_up)


def glu_backward(dh: Array, gate_up: Array, activation: str) -> tuple[Array, Array]:
    """From the gradient [M, F] of the gated unit: the unit itself, over dh; and the gradient of gate_up, over it."""
    m, width = dh.shape

    def kernel(dh_ref: Any, gate_up_ref: Any, h_ref: Any, out_ref: Any) -> None:
        row, start = pl.program_id(0), pl.program_id(1) * _TILE
        column = start + lax.broadcasted_iota(jnp.int32, (_TILE,), 0)
        inside = column < width

        def load(ref: Any, offset: int) -> Array:
            return plt.load(ref.at[row, pl.ds(offset + start, _TILE)], mask=inside, other=0.0).astype(jnp.float32)

        d, gate, up = load(dh_ref, 0), load(gate_up_ref, 0), load(gate_up_ref, width)
        value, slope = _activation(gate, activation)
        for ref, offset, result in (
            (h_ref, 0, value * up),
            (out_ref, 0, d * up * slope),
            (out_ref, width, d * value),
        ):
            plt.store(ref.at[row, pl.ds(offset + start, _TILE)], result.astype(dh.dtype), mask=inside)

    shape = jax.ShapeDtypeStruct
    return triton_call(
        kernel,
        out_shape=[shape(dh.shape, dh.dtype), shape(gate_up.shape, gate_up.dtype)],
        grid=(m, -(-width // _TILE)),
        in_specs=[_WHOLE] * 2,
        out_specs=[_WHOLE] * 2,
        input_output_aliases={0: 0, 1: 1},
        num_warps=_WARPS,
        name="glu_backward",
    )(dh, gate_up)
