"""RMSNorm as Pallas kernels through Triton.

Why they exist: XLA passes over a row once for its statistics and once more to scale it, in the backward pass three
times; here a row stays in registers. The kernels take in their neighbours: the addition of the residual stream and an
output with room for an adapter's columns forward, the sum of up to three gradients backward. Numerics: statistics and
gradients in float32; roundings where the reference has them. Refuses rows that do not fit the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._device import multiprocessors
from pallas_kernels._triton import WHOLE, load_f32, masked_span, row_kernel_reason, triton_call
from pallas_kernels.rms_norm.reference import scaled

_MAX_WIDTH = 32768
# Elements that one program holds of each array (one row, or several short ones), and that one warp does.
_TILE, _ELEMENTS_PER_WARP = 4096, 512
# Where there are many tiles, programs stay and take them in turn, the next one's loads under way: so many that those of
# a multiprocessor fit its registers and threads (a forward pass with a residual has one more array, and no program
# stays), and so many elements of a tile a warp.
_STAYING_FORWARD, _STAYING_BACKWARD = (5, 512), (2, 256)


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
    sources = [x] if residual is None else [x, residual]
    outputs = [shape((m, d + tail), x.dtype), shape((m,), jnp.float32)]
    outputs += [] if residual is None else [shape((m, d), x.dtype)]

    def read(first: Array, refs: Any) -> list[Array]:
        _, inside = _position(first, m, d)
        return [_load(ref, first, d, inside) for ref in refs[: len(sources)]]

    def write(first: Array, values: list[Array], refs: Any) -> None:
        scale_ref, y_ref, inverse_ref, *total_ref = refs[len(sources) :]
        row, inside = _position(first, m, d)
        at, columns = pl.ds(first, rows), masked_span(0, size, first)
        value = values[0].astype(jnp.float32)
        if residual is not None:
            total = (value + values[1].astype(jnp.float32)).astype(x.dtype)
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

    staying = _STAYING_FORWARD if residual is None else None
    y, inverse, *total = _call(read, write, "rms_norm_forward", [*sources, scale], outputs, (m, d), staying)
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

    def read(first: Array, refs: Any) -> list[Array]:
        row, inside = _position(first, m, d)
        inverse = load_f32(refs[1].at[pl.ds(first, rows)], None if m % rows == 0 else row < m)
        return [inverse, *(_load(ref, first, d, inside) for ref in refs[2:-1])]

    def write(first: Array, values: list[Array], refs: Any) -> None:
        _, inside = _position(first, m, d)
        columns = masked_span(0, size, first)
        inverse, normalised, gradient, *rest = (value.astype(jnp.float32) for value in values)
        if extra is not None:
            gradient += rest[0]
        weight = load_f32(refs[0].at[columns], _columns_inside(d))
        gradient *= (1.0 + weight if unit_offset else weight)[None, :]
        normalised *= inverse[:, None]
        along = jnp.sum(gradient * normalised, axis=1, keepdims=True) / d
        dx = inverse[:, None] * (gradient - normalised * along)
        if d_total is not None:
            dx += rest[-1]
        plt.store(refs[-1].at[pl.ds(first, rows), columns], dx.astype(total.dtype), mask=inside)

    operands = [scale, inverse_rms, total, dy, *(g for g in (extra, d_total) if g is not None)]
    outputs = [jax.ShapeDtypeStruct((m, d), total.dtype)]
    (dx,) = _call(read, write, "rms_norm_backward", operands, outputs, (m, d), _STAYING_BACKWARD)
    return dx


def _tile(d: int) -> tuple[int, int]:
    """Rows of one program, and the power of two that holds a row."""
    size = pl.next_power_of_2(d)
    return max(_TILE // size, 1), size


def _columns_inside(d: int) -> Array | None:
    """Which lanes of a row exist; None if all do."""
    size = pl.next_power_of_2(d)
    return None if size == d else lax.iota(jnp.int32, size) < d


def _load(ref: Any, first: Array, d: int, inside: Array | None) -> Array:
    """A tile of rows from `first` on, with zeros where nothing is."""
    rows, size = _tile(d)
    other = None if inside is None else 0.0
    return plt.load(ref.at[pl.ds(first, rows), masked_span(0, size, first)], mask=inside, other=other)


def _position(first: Array, m: int, d: int) -> tuple[Array, Array | None]:
    """The rows of a tile, and which of its elements exist (None if all do)."""
    rows, size = _tile(d)
    row = first + lax.iota(jnp.int32, rows)
    if m % rows == 0 and size == d:
        return row, None
    column = lax.broadcasted_iota(jnp.int32, (rows, size), 1)
    return row, (column < d) & (row < m)[:, None]


def _call(
    read: Callable[..., list[Array]],
    write: Callable[..., None],
    name: str,
    operands: list[Array],
    outputs: list[Any],
    shape: tuple[int, int],
    staying: tuple[int, int] | None,
) -> list[Array]:
    """`write`(first row, what `read`(first row, refs) gave, refs) for each tile of rows.

    staying: programs that stay on a multiprocessor, and their elements a warp; None where none should.
    """
    rows, size = _tile(shape[1])
    tiles = pl.cdiv(shape[0], rows)
    programs, per_warp = tiles, _ELEMENTS_PER_WARP
    if staying is not None and rows * size <= _TILE and tiles >= 2 * staying[0] * multiprocessors():
        programs, per_warp = staying[0] * multiprocessors(), staying[1]

    def kernel(*refs: Any) -> None:
        begin = pl.program_id(0)

        def step(index: Array, now: list[Array]) -> list[Array]:
            tile = begin + index * programs
            ahead = read(jnp.minimum(tile + programs, tiles - 1) * rows, refs)
            write(tile * rows, now, refs)
            return ahead

        now = read(begin * rows, refs)
        if programs < tiles:
            lax.fori_loop(0, (tiles - begin + programs - 1) // programs, step, now)
        else:
            write(begin * rows, now, refs)

    return triton_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * len(outputs),
        num_warps=min(rows * size // per_warp, 16),
        name=name,
    )(*operands)
