"""What comes before the products of one row, in generation: norm, gated unit or the joining of attention's parts,
together with the adapters' low rank.

Why it exists: for one token a step is a chain of small launches, each of which waits for the one before it. Here the
products with all lora_a of a group take in what makes their input, which every program makes for itself: all of a row
to be normalised, else a span of columns, whose sums the product behind adds up. The adapters are read in the stack of
all layers. Numerics: those of `rms_norm` and `glu` (statistics and units in float32, rounded where they round), the
products' sums in float32. No gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._stack import StackLayer, as_stack_layer
from pallas_kernels._triton import WHOLE, load_f32, triton_call
from pallas_kernels.attention.parts import AttentionParts, divisor
from pallas_kernels.glu.triton import gated
from pallas_kernels.lora_linear.projection import Group
from pallas_kernels.rms_norm.reference import scaled

# Rows of lora_a of one program, and its columns where it needs no more of a row, fewer where each is a sum; the longest
# row to be normalised; elements of a row that a warp has.
_ROWS, _SPAN, _JOINED_SPAN, _WIDEST = 2, 1024, 512, 16384
_PER_WARP, _MOST_WARPS = 256, 16


def normed_low_row(
    x: Array,
    residual: Array | None,
    scale: Array | StackLayer,
    group: Group,
    eps: float,
    unit_offset: bool,
    scaling: float,
) -> tuple[Array, Array, Array]:
    """x [1, D] -> rms_norm(x + residual), x + residual, and its products with the lora_a: [1, D], [1, D], [1, sum of R]
    in float32. See `pallas_kernels.norm_linear.api`; D is at most 16,384."""
    d, scale = x.shape[1], as_stack_layer(scale)
    operands = [x[0], jnp.reshape(scale.index, (1,)), scale.stack] + ([] if residual is None else [residual[0]])

    def make(refs: Any, columns: Any, inside: Array | None) -> tuple[Array, Array]:
        x_ref, index_ref, scale_ref, *residual_ref = refs
        weight = plt.load(scale_ref.at[index_ref[0], columns], mask=inside, other=None if inside is None else 0.0)
        total = load_f32(x_ref.at[columns], inside)
        if residual is not None:
            total = (total + load_f32(residual_ref[0].at[columns], inside)).astype(x.dtype).astype(jnp.float32)
        inverse = lax.rsqrt(jnp.sum(total * total) / d + eps)
        return scaled(total * inverse, weight, x.dtype, unit_offset), total.astype(x.dtype)

    size = pl.next_power_of_2(d)
    h, total, low = _low(make, operands, 2, (d, size), x.dtype, group, scaling, "norm_low_row")
    return h, total, low


def gated_low_row(gate_up: Array, group: Group, activation: str, scaling: float) -> tuple[Array, Array]:
    """gate_up [1, 2 F] -> glu(gate, up) [1, F] and its products with the lora_a, float32 [spans, sum of R] to add
    up."""
    f = gate_up.shape[1] // 2

    def make(refs: Any, columns: Any, inside: Array | None) -> tuple[Array]:
        gate, up = (load_f32(refs[0].at[pl.ds(columns.start + at, columns.size)], inside) for at in (0, f))
        return (gated(gate, up, activation).astype(gate_up.dtype),)

    size = min(_SPAN, pl.next_power_of_2(f))
    h, low = _low(make, [gate_up[0]], 1, (f, size), gate_up.dtype, group, scaling, "glu_low_row")
    return h, low


def low_row(x: Array, group: Group, scaling: float) -> Array:
    """x [1, K] times the lora_a: float32 [spans, sum of R] to add up."""

    def make(refs: Any, columns: Any, inside: Array | None) -> tuple[Array]:
        return (load_f32(refs[0].at[columns], inside),)

    k = x.shape[1]
    (low,) = _low(make, [x[0]], 0, (k, min(_SPAN, pl.next_power_of_2(k))), x.dtype, group, scaling, "low_row")
    return low


def joined_low_row(x: AttentionParts, group: Group, scaling: float) -> tuple[Array, Array]:
    """Parts of attention of one token -> the whole [1, K] and its products with the lora_a, float32 [spans, sum of R]
    to add up."""
    _, parts, n, h = x.out.shape

    def make(refs: Any, columns: Any, inside: Array | None) -> tuple[Array]:
        out_ref, highest_ref, total_ref = refs
        count = columns.size // h
        heads = columns.start // h + lax.iota(jnp.int32, count)
        there, at = None if inside is None else heads < n, lax.iota(jnp.int32, h)[None]
        everywhere = None if there is None else jnp.broadcast_to(there[:, None], (count, h))
        each = [load_f32(highest_ref.at[part, heads], there) for part in range(parts)]
        most = functools.reduce(jnp.maximum, each)
        sums, total = jnp.zeros((count, h), jnp.float32), jnp.zeros(count, jnp.float32)
        for part, highest in enumerate(each):
            weight = jnp.exp(highest - most)
            total += weight * load_f32(total_ref.at[part, heads], there)
            sums += weight[:, None] * load_f32(out_ref.at[part, heads[:, None], at], everywhere)
        return ((sums / divisor(total)[:, None]).astype(x.dtype).reshape(columns.size),)

    k = n * h
    size = min(max(_JOINED_SPAN, h), pl.next_power_of_2(k))
    operands = [x.out[0], x.highest[0], x.total[0]]
    whole, low = _low(make, operands, 1, (k, size), jnp.dtype(x.dtype), group, scaling, "join_low_row")
    return whole, low


def normed_reason(width: int) -> str | None:
    """Why a row so wide cannot be normalised here, or None."""
    return None if width <= _WIDEST else f"rows of {width} elements are too wide: at most {_WIDEST} fit the registers"


def _low(
    make: Callable[..., tuple[Array, ...]],
    operands: list[Array],
    made: int,
    row: tuple[int, int],
    dtype: Any,
    group: Group,
    scaling: float,
    name: str,
) -> list[Array]:
    """`made` rows [1, K] in dtype that `make` gives for a span of columns, and the first one's products with lora_a,
    [spans, sum of R].

    row: K, and the columns of a span, each of which has programs of its own.
    """
    (k, width), adapted = row, [p for p in group if p.rank]
    members, programs, column = [], 0, 0
    inputs = list(operands)
    for p in adapted:
        a, rows = as_stack_layer(p.lora_a), _ROWS if p.rank % _ROWS == 0 else 1
        members.append((programs, programs + p.rank // rows, rows, column, len(inputs)))
        inputs += [jnp.reshape(a.index, (1,)), a.stack]
        programs, column = programs + p.rank // rows, column + p.rank

    spans = pl.cdiv(k, width)

    def kernel(*refs: Any) -> None:
        number, span, outs = pl.program_id(0), pl.program_id(1), refs[len(inputs) :]
        start = span * width
        inside = None if k % width == 0 else start + lax.iota(jnp.int32, width) < k
        columns = pl.ds(start, width)

        def run(first: int, rows: int, column: int, at: int) -> None:
            # Before what comes next, whose sums wait for each other.
            index_ref, a_ref = refs[at : at + 2]
            within = None if inside is None else jnp.broadcast_to(inside[None], (rows, width))
            a = load_f32(a_ref.at[index_ref[0], pl.ds((number - first) * rows, rows), columns], within)
            arrays = make(refs[: len(operands)], columns, inside)
            sums = jnp.sum(a * arrays[0].astype(jnp.float32)[None], axis=1)
            plt.store(outs[made].at[span, pl.ds(column + (number - first) * rows, rows)], scaling * sums)
            if first == 0:

                @pl.when(number == 0)
                def _() -> None:
                    for ref, array in zip(outs[:made], arrays, strict=False):
                        plt.store(ref.at[columns], array, mask=inside)

        for first, end, *member in members:
            pl.when((number >= first) & (number < end))(partial(run, first, *member))

    shapes = [jax.ShapeDtypeStruct((k,), dtype)] * made + [jax.ShapeDtypeStruct((spans, column), jnp.float32)]
    results = triton_call(
        kernel,
        out_shape=shapes,
        grid=(programs, spans),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * len(shapes),
        num_warps=max(1, min(_MOST_WARPS, width // _PER_WARP)),
        name=name,
    )(*inputs)
    return [*(result[None] for result in results[:made]), results[made]]
