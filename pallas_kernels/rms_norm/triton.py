"""RMSNorm as Pallas kernels through Triton.

Why they exist: XLA passes over a row once for its statistics and once more to scale it, in the backward pass three
times; here a row stays in registers. The kernels take in their neighbours: the addition of the residual stream and an
output with room for an adapter's columns forward, the sum of up to three gradients backward. Numerics: statistics and
gradients in float32; roundings where the reference has them. Refuses rows that do not fit the registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, load_f32, masked_span, row_kernel_reason, triton_call
from pallas_kernels.rms_norm.reference import scaled

_MAX_WIDTH = 32768
# Elements that one program holds of each array (one row, or several short ones), and that one warp does.
_TILE, _ELEMENTS_PER_WARP = 4096, 512


def unsupported_reason(x: Array, *others: Array) -> str | None:
    """Why rows like x's, and the other operands, cannot be served here, or None."""
    if x.shape[-1] > _MAX_WIDTH:
        return f"rows of {x.shape[-1]} elements are too wide: at most {_MAX_WIDTH} fit the registers"
    return row_kernel_reason(x, *others)


def rms_norm_forward_triton(
    x: Array, scale: Array, residual: Array | None, eps: float, unit_offset: bool, tail: int
) -> tuple[Array, Array, Array]:
    """See `pallas_kernels.rms_norm.api.rms_norm_forward`."""
    m, d = x.shape
    rows, size = _tile(d)
    shape = jax.ShapeDtypeStruct
    operands = [x, scale] if residual is None else [x, scale, residual]
    outputs = [shape((m, d + tail), x.dtype), shape((m,), jnp.float32)]
    outputs += [] if residual is None else [shape((m, d), x.dtype)]

    def kernel(*refs: Any) -> None:
        x_ref, scale_ref, *residual_ref = refs[: len(operands)]
        y_ref, inverse_ref, *total_ref = refs[len(operands) :]
        first, row, inside = _position(m, d)
        at, columns = pl.ds(first, rows), masked_span(0, size, first)
        value = load_f32(x_ref.at[at, columns], inside)
        if residual is not None:
            total = (value + load_f32(residual_ref[0].at[at, columns], inside)).astype(x.dtype)
            plt.store(total_ref[0].at[at, columns], total, mask=inside)
            value = total.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.sum(value * value, axis=1) / d + eps)
        weight = plt.load(scale_ref.at[columns], mask=_columns_inside(d))
        y = scaled(value * inverse[:, None], weight[None, :], x.dtype, unit_offset)
        plt.store(y_ref.at[at, columns], y, mask=inside)
        if tail:
            width = pl.next_power_of_2(tail)
            behind = lax.broadcasted_iota(jnp.int32, (rows, width), 1) < tail
            zeros = jnp.zeros((rows, width), x.dtype)
            plt.store(y_ref.at[at, masked_span(d, width, first)], zeros, mask=behind & (row < m)[:, None])
        plt.store(inverse_ref.at[at], inverse, mask=None if m % rows == 0 else row < m)

    y, inverse, *total = _call(kernel, "rms_norm_forward", operands, outputs, (m, d))
    return y, inverse, total[0] if total else x


def rms_norm_backward_triton(
    total: Array,
    scale: Array,
    inverse_rms: Array,
    dy: Array,
    extra: Array | None,
    d_total: Array | None,
    unit_offset: bool,
) -> Array:
    """See `pallas_kernels.rms_norm.api.rms_norm_backward`."""
    m, d = total.shape
    rows, size = _tile(d)

    def kernel(total_ref: Any, scale_ref: Any, inverse_ref: Any, dy_ref: Any, *refs: Any) -> None:
        first, row, inside = _position(m, d)
        at, columns = pl.ds(first, rows), masked_span(0, size, first)
        gradient = load_f32(dy_ref.at[at, columns], inside)
        if extra is not None:
            gradient += load_f32(refs[0].at[at, columns], inside)
        weight = load_f32(scale_ref.at[columns], _columns_inside(d))
        gradient *= (1.0 + weight if unit_offset else weight)[None, :]
        inverse = load_f32(inverse_ref.at[at], None if m % rows == 0 else row < m)[:, None]
        normalised = load_f32(total_ref.at[at, columns], inside) * inverse
        along = jnp.sum(gradient * normalised, axis=1, keepdims=True) / d
        dx = inverse * (gradient - normalised * along)
        if d_total is not None:
            dx += load_f32(refs[-2].at[at, columns], inside)
        plt.store(refs[-1].at[at, columns], dx.astype(total.dtype), mask=inside)

    operands = [total, scale, inverse_rms, dy, *(g for g in (extra, d_total) if g is not None)]
    (dx,) = _call(kernel, "rms_norm_backward", operands, [jax.ShapeDtypeStruct((m, d), total.dtype)], (m, d))
    return dx


def _tile(d: int) -> tuple[int, int]:
    """Rows of one program, and the power of two that holds a row."""
    size = pl.next_power_of_2(d)
    return max(_TILE // size, 1), size


def _columns_inside(d: int) -> Array | None:
    """Which lanes of a row exist; None if all do."""
    size = pl.next_power_of_2(d)
    return None if size == d else lax.iota(jnp.int32, size) < d


def _position(m: int, d: int) -> tuple[Array, Array, Array | None]:
    """This program's first row, its rows, and which elements of its tile exist (None if all do)."""
    rows, size = _tile(d)
    first = pl.program_id(0) * rows
    row = first + lax.iota(jnp.int32, rows)
    if m % rows == 0 and size == d:
        return first, row, None
    column = lax.broadcasted_iota(jnp.int32, (rows, size), 1)
    return first, row, (column < d) & (row < m)[:, None]


def _call(kernel: Any, name: str, operands: list[Array], outputs: list[Any], shape: tuple[int, int]) -> list[Array]:
    rows, size = _tile(shape[1])
    return triton_call(
        kernel,
        out_shape=outputs,
        grid=(pl.cdiv(shape[0], rows),),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * len(outputs),
        num_warps=min(rows * size // _ELEMENTS_PER_WARP, 16),
        name=name,
    )(*operands)
