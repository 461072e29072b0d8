"""Gated linear units as Pallas kernels through Triton.

Why they exist: gate and up are read where one product left them, beside each other; the result goes into an array that
has room for an adapter's columns; and the backward pass writes its results over its inputs, so that nothing of the
MLP's width is allocated. XLA reaches less than half of the memory bandwidth with the exact GELU. Numerics: all in
float32, each result rounded once. Triton's lowering has no error function: the normal distribution's tail is
exp(-x^2 / 2) times a polynomial fitted to 2e-8 of it, so that float32 results are within 1e-6. The exact GELU keeps up
with the memory for want of instructions: exponentials are to base 2, which the hardware has, reciprocals are squares of
its reciprocal root, and the polynomial is fused multiplications and additions.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, interpreting, load_f32, masked_span, row_kernel_reason, triton_call

# Columns that one program works on, and that one of its warps does.
_MAX_TILE, _MIN_TILE, _FORWARD_COLUMNS, _BACKWARD_COLUMNS = 2048, 512, 512, 256

_LOG2_E = math.log2(math.e)
# erfc(a) exp(a^2) = t P(t), t = 1 / (1 + _TAIL_SCALE a), for a in [0, 9.6]: a minimax fit of relative error 2e-8.
_TAIL_SCALE = 0.3
_TAIL_POLYNOMIAL = (
    0.169189179,
    0.170698233,
    0.148443754,
    0.214568324,
    -0.093905776,
    0.54675147,
    -0.511509083,
    0.485221797,
    -0.129457917,
)


def unsupported_reason(*arrays: Array) -> str | None:
    """Why these operands cannot be served here, or None."""
    return row_kernel_reason(*arrays)


def glu_forward_triton(operands: tuple[Array, ...], activation: str, tail: int) -> Array:
    """See `pallas_kernels.glu.api.glu_forward`."""
    m, width, offset = _layout(operands)
    tile = _tile(width)

    def kernel(gate_ref: Any, up_ref: Any, out_ref: Any) -> None:
        row, start, inside = _position(tile, width)
        gate = load_f32(gate_ref.at[row, pl.ds(start, tile)], inside)
        up = load_f32(up_ref.at[row, pl.ds(offset + start, tile)], inside)
        value = gated(gate, up, activation)
        plt.store(out_ref.at[row, pl.ds(start, tile)], value.astype(out_ref.dtype), mask=inside)
        if tail:

            @pl.when(start == 0)
            def _() -> None:
                size = pl.next_power_of_2(tail)
                at = out_ref.at[row, masked_span(width, size, row)]
                plt.store(at, jnp.zeros((size,), out_ref.dtype), mask=lax.iota(jnp.int32, size) < tail)

    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, width + tail), operands[0].dtype),
        grid=(pl.cdiv(width, tile) * m,),
        in_specs=[WHOLE] * 2,
        out_specs=WHOLE,
        num_warps=tile // _FORWARD_COLUMNS,
        name="glu_forward",
    )(operands[0], operands[-1])


def glu_backward_triton(
    dh: Array, operands: tuple[Array, ...], activation: str, with_h: bool
) -> tuple[Array | None, tuple[Array, ...]]:
    """See `pallas_kernels.glu.api.glu_backward`."""
    m, width, offset = _layout(operands)
    tile = _tile(width)

    def kernel(dh_ref: Any, *refs: Any) -> None:
        inputs, outputs = refs[: len(operands)], refs[len(operands) :]
        row, start, inside = _position(tile, width)
        at = pl.ds(start, tile)
        d, gate = load_f32(dh_ref.at[row, at], inside), load_f32(inputs[0].at[row, at], inside)
        up = load_f32(inputs[-1].at[row, pl.ds(offset + start, tile)], inside)
        weight, slope = _weight_and_slope(gate, activation)
        results = [(outputs[-len(operands)], 0, d * up * (weight + gate * slope))]
        results += [(outputs[-1], offset, d * (gate * weight))]
        results += [(outputs[0], 0, gate * weight * up)] * with_h
        for ref, first, value in results:
            plt.store(ref.at[row, pl.ds(first + start, tile)], value.astype(ref.dtype), mask=inside)

    over = [*([dh] * with_h), *operands]
    aliases = {(0 if with_h else 1) + i: i for i in range(len(over))}
    results = triton_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in over],
        grid=(pl.cdiv(width, tile) * m,),
        in_specs=[WHOLE] * (1 + len(operands)),
        out_specs=[WHOLE] * len(over),
        input_output_aliases=aliases,
        num_warps=tile // _BACKWARD_COLUMNS,
        name="glu_backward",
    )(dh, *operands)
    return (results[0] if with_h else None), tuple(results[with_h:])


def gated(gate: Array, up: Array, activation: str) -> Array:
    """activation(gate) * up, all float32."""
    return gate * _weight_and_slope(gate, activation)[0] * up


def _layout(operands: tuple[Array, ...]) -> tuple[int, int, int]:
    """Rows, the unit's width, and the column of the last operand at which up begins."""
    m, columns = operands[0].shape
    return (m, columns, 0) if len(operands) == 2 else (m, columns // 2, columns // 2)


def _tile(width: int) -> int:
    # A power of two that divides the width wastes no lane: all real models have one of 512 or more.
    return min(max(width & -width, _MIN_TILE), _MAX_TILE)


def _position(tile: int, width: int) -> tuple[Array, Array, Array | None]:
    """This program's row, its first column, and which of its columns exist (None if all do).

    Programs that follow each other work beside each other, which on an H200 takes 4 % less than below each other.
    """
    tiles = pl.cdiv(width, tile)
    row, start = pl.program_id(0) // tiles, pl.program_id(0) % tiles * tile
    return row, start, None if width % tile == 0 else start + lax.iota(jnp.int32, tile) < width


def _weight_and_slope(x: Array, activation: str) -> tuple[Array, Array]:
    """w(x) and w'(x), where the activation is x w(x); float32."""
    if activation == "silu":
        w = _reciprocal(1.0 + jnp.exp2(-_LOG2_E * x))
        return w, w * (1.0 - w)
    if activation == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        factor, cubic = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
        w = _reciprocal(1.0 + jnp.exp2((-_LOG2_E * factor) * x * (1.0 + cubic * x * x)))
        return w, w * (1.0 - w) * factor * (1.0 + 3.0 * cubic * x * x)
    assert activation == "gelu", activation
    t = _reciprocal(_fma(jnp.abs(x), _TAIL_SCALE * math.sqrt(0.5), 1.0))
    polynomial = jnp.full_like(x, 0.5 * _TAIL_POLYNOMIAL[-1])
    for coefficient in _TAIL_POLYNOMIAL[-2::-1]:
        polynomial = _fma(polynomial, t, 0.5 * coefficient)
    bell = jnp.exp2((-0.5 * _LOG2_E) * x * x)
    tail = bell * t * polynomial
    return jnp.where(x < 0.0, tail, 1.0 - tail), bell * (1.0 / math.sqrt(2.0 * math.pi))


def _reciprocal(x: Array) -> Array:
    """1 / x of positive numbers, within two units in the last place: a division takes four times as long."""
    root = lax.rsqrt(x)
    return root * root


def _fma(a: Array, b: Array | float, c: float) -> Array:
    """a b + c in one instruction, which compilers do not make of a product and a sum here."""
    if interpreting():
        return a * b + c
    operands = [a, *(jnp.broadcast_to(jnp.asarray(x, jnp.float32), a.shape) for x in (b, c))]
    shape = jax.ShapeDtypeStruct(a.shape, jnp.float32)
    [result] = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=operands, constraints="=f,f,f,f", pack=1, result_shape_dtypes=[shape]
    )
    return result
