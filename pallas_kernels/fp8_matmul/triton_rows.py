"""What stands around an 8-bit product as Pallas kernels through Triton: rows rounded to e4m3, and results finished.

Why they exist: XLA reads a row once for its largest value and once more to round it; here it stays on the chip. And
what cuBLASLt leaves is multiplied by two scales and then added to by an adapter's product, each a pass over the largest
arrays of a layer; here both are one pass, in place. Numerics: rows as the reference's, but for the last bit of a GPU's
division; results are scaled and summed in float32 and rounded once, where the separate passes round twice. Refuses to
round rows that do not fit the registers, and on GPUs before Ada.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._device import compute_capability
from pallas_kernels._triton import (
    WHOLE,
    gpu_reason,
    interpreting,
    load_f32,
    masked_span,
    row_kernel_reason,
    triton_call,
)
from pallas_kernels.fp8_matmul.reference import E4M3, row_scales

_MAX_WIDTH = 32768
# A row is read in pieces of at most so many elements if whole ones make it up; in one, with lanes that are masked, if
# that took pieces of less than the second. The third is what one warp holds.
_PIECE, _LEAST_PIECE, _ELEMENTS_PER_WARP = 4096, 512, 1024
# Wider rows are read twice, the second time from the cache: in registers they leave room for one row to a
# multiprocessor, which then waits for memory before it computes.
_KEPT_WIDTH = 16384
# A tile of a result, and how much of the adapter's contraction is taken at a time; Triton's least is 16.
_TILE_ROWS, _TILE_COLUMNS, _STEP, _LEAST_STEP = 128, 128, 64, 16


def e4m3_reason() -> str | None:
    """Why Triton cannot convert to e4m3 here, or None: it ends the process where it cannot."""
    if (reason := gpu_reason()) is not None or interpreting():
        return reason
    capability = compute_capability()
    assert capability is not None, "gpu_reason asks for a GPU"
    return None if capability >= 8.9 else f"e4m3 needs compute capability 8.9 or newer (Ada), this GPU has {capability}"


def quantize_reason(x: Array) -> str | None:
    """Why rows like x's cannot be rounded here, or None."""
    if x.shape[-1] > _MAX_WIDTH:
        return f"rows of {x.shape[-1]} elements are too wide: at most {_MAX_WIDTH} fit the registers"
    if 2**31 < x.size <= 2**32:
        return f"{x.size} bytes of results are more than offsets of 32 bits reach"
    return row_kernel_reason(x) or e4m3_reason()


def finish_reason() -> str | None:
    """Why results cannot be finished here, or None."""
    return gpu_reason()


def quantize_rows_triton(x: Array, column_scale: Array | None) -> tuple[Array, Array]:
    """e4m3 [M, K] and float32 [M] of x [M, K], times column_scale [K] before it is rounded where there is one."""
    m, k = x.shape
    size = min(k & -k, _PIECE)
    if size < _LEAST_PIECE:
        size = pl.next_power_of_2(k)

    def kernel(x_ref: Any, *refs: Any) -> None:
        row = pl.program_id(0)
        pieces = [masked_span(start, size, row) for start in range(0, k, size)]
        inside = None if k % size == 0 else lax.iota(jnp.int32, size) < k

        def read(piece: Any) -> Array:
            values = load_f32(x_ref.at[row, piece], inside)
            return values if column_scale is None else values * load_f32(refs[0].at[piece], inside)

        kept = [read(piece) for piece in pieces]
        scale = row_scales(jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, kept))))
        for piece, values in zip(pieces, kept, strict=True):
            values = values if k <= _KEPT_WIDTH else read(piece)
            plt.store(refs[-2].at[row, piece], (values / scale).astype(E4M3), mask=inside)
        plt.store(refs[-1].at[row], scale)

    operands = [x] if column_scale is None else [x, column_scale]
    values, scale = triton_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, k), E4M3), jax.ShapeDtypeStruct((m,), jnp.float32)],
        grid=(m,),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * 2,
        num_warps=max(1, min(pl.next_power_of_2(k) // _ELEMENTS_PER_WARP, 16)),
        name="fp8_quantize_rows",
    )(*operands)
    return values, scale


def finish_triton(
    raw: Array, row_scale: Array, column_scale: Array | None, low_rank: tuple[Array, Array] | None
) -> Array:
    """raw [M, N] times its rows' and columns' scales, plus t b^T of low_rank = (t [M, R], b [N, R]); over raw."""
    m, n = raw.shape
    rows, columns = (
        min(most, max(_LEAST_STEP, pl.next_power_of_2(size))) for most, size in ((_TILE_ROWS, m), (_TILE_COLUMNS, n))
    )
    operands, rank, step = [raw, row_scale, *([] if column_scale is None else [column_scale])], 0, _STEP
    if low_rank is not None:
        short = -low_rank[0].shape[1] % _LEAST_STEP
        operands += [jnp.pad(part, ((0, 0), (0, short))) if short else part for part in low_rank]
        rank = low_rank[0].shape[1] + short
        step = min(_STEP, rank & -rank)

    def kernel(raw_ref: Any, row_scale_ref: Any, *refs: Any) -> None:
        # The grid's first axis is what runs side by side: neighbours in memory.
        first, column = pl.program_id(1) * rows, pl.program_id(0) * columns
        at, across = pl.ds(first, rows), pl.ds(column, columns)
        in_rows, in_columns = first + lax.iota(jnp.int32, rows) < m, column + lax.iota(jnp.int32, columns) < n
        whole = m % rows == 0 and n % columns == 0
        inside = None if whole else in_rows[:, None] & in_columns[None, :]
        values = load_f32(raw_ref.at[at, across], inside)
        values *= load_f32(row_scale_ref.at[at], None if whole else in_rows)[:, None]
        if column_scale is not None:
            values *= load_f32(refs[0].at[across], None if whole else in_columns)[None, :]
        for start in range(0, rank, step):
            t, b = (
                plt.load(
                    ref.at[span, pl.ds(start, step)],
                    mask=None if whole else jnp.broadcast_to(lanes[:, None], (lanes.size, step)),
                    other=None if whole else 0.0,
                )
                for ref, span, lanes in ((refs[-3], at, in_rows), (refs[-2], across, in_columns))
            )
            precision = lax.Precision.HIGHEST if t.dtype == jnp.float32 else None
            values += plt.dot(t, b, trans_b=True, precision=precision)
        plt.store(refs[-1].at[at, across], values.astype(raw.dtype), mask=inside)

    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), raw.dtype),
        grid=(pl.cdiv(n, columns), pl.cdiv(m, rows)),
        in_specs=[WHOLE] * len(operands),
        out_specs=WHOLE,
        input_output_aliases={0: 0},
        num_warps=8,
        name="fp8_finish",
    )(*operands)
