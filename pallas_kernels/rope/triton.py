"""Rotary position embedding as one Pallas kernel through Triton.

Why it exists: queries and keys in one launch and over their own memory; and queries, keys and values cut out of the one
product that made them, or put back into one, while they are rotated (XLA takes a pass for each of the three: on an
H200 170 us instead of 50). Numerics: the reference's, in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, load_f32, masked_span, row_kernel_reason, triton_call

# Pairs of elements that a program rotates at a time, and heads that stand in registers together.
_TILE, _MAX_HEADS, _WARPS = 2048, 32, 4


class _Move(NamedTuple):
    """`heads` heads from one array to another, rotated or not."""

    source: int
    source_head: int
    target: int
    target_head: int
    heads: int
    rotated: bool = True


def unsupported_reason(*arrays: Array) -> str | None:
    """Why these operands cannot be served here, or None."""
    return row_kernel_reason(*arrays)


def rotate_triton(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """q and k rotated by their tokens' angles, over q and k where the compiler can."""
    moves = [_Move(i, 0, i, 0, x.shape[2]) for i, x in enumerate((q, k))]
    q, k = _run("rope", moves, [q, k], [q.shape[2], k.shape[2]], cos, sin, in_place=True)
    return q, k


def split_triton(qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """[B, T, N + 2K, H] -> rotated q and k, and v."""
    moves = [
        _Move(0, 0, 0, 0, heads),
        _Move(0, heads, 1, 0, kv_heads),
        _Move(0, heads + kv_heads, 2, 0, kv_heads, rotated=False),
    ]
    q, k, v = _run("rope_split", moves, [qkv], [heads, kv_heads, kv_heads], cos, sin, in_place=False)
    return q, k, v


def join_triton(q: Array, k: Array, v: Array, cos: Array, sin: Array) -> Array:
    """The inverse of `split_triton` for angles of the other sign."""
    n, kv = q.shape[2], k.shape[2]
    moves = [_Move(0, 0, 0, 0, n), _Move(1, 0, 0, n, kv), _Move(2, 0, 0, n + kv, kv, rotated=False)]
    (qkv,) = _run("rope_join", moves, [q, k, v], [n + 2 * kv], cos, sin, in_place=False)
    return qkv


def _run(
    name: str, moves: list[_Move], sources: list[Array], heads: list[int], cos: Array, sin: Array, *, in_place: bool
) -> list[Array]:
    """Arrays [B, T, heads, H] made of `sources` by `moves`; in place, what is not rotated stays."""
    b, t, _, width = sources[0].shape
    m, half = b * t, cos.shape[-1]
    size = pl.next_power_of_2(half)
    per_token = size * min(pl.next_power_of_2(sum(x.shape[2] for x in sources)), _MAX_HEADS)
    tokens = max(_TILE // per_token, 1)

    def kernel(*refs: Any) -> None:
        inputs, (cos_ref, sin_ref), outputs = refs[: len(sources)], refs[len(sources) :][:2], refs[len(sources) + 2 :]
        first = pl.program_id(0) * tokens
        at = pl.ds(first, tokens)

        def span(start: int, columns: int) -> Any:
            return masked_span(start, pl.next_power_of_2(columns), first)

        def inside(count: int, columns: int) -> Array | None:
            """Which elements of a tile of tokens, heads and columns exist; None if all do."""
            shape = (tokens, count, pl.next_power_of_2(columns))
            if m % tokens == 0 and shape[2] == columns:
                return None
            token, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
            return (first + token < m) & (column < columns)

        low, high = span(0, half), span(half, half)
        cosines, sines = (load_f32(ref.at[at, pl.ds(0, 1), low], inside(1, half)) for ref in (cos_ref, sin_ref))
        for move in moves:
            source, target = inputs[move.source], outputs[move.target]
            for head, count in _chunks(move.heads):
                from_heads, to_heads = pl.ds(move.source_head + head, count), pl.ds(move.target_head + head, count)
                if move.rotated:
                    mask = inside(count, half)
                    x, y = (load_f32(source.at[at, from_heads, columns], mask) for columns in (low, high))
                    for columns, value in ((low, x * cosines - y * sines), (high, y * cosines + x * sines)):
                        plt.store(target.at[at, to_heads, columns], value.astype(target.dtype), mask=mask)
                kept = (0 if in_place else width - 2 * half) if move.rotated else width
                if kept:
                    columns, mask = span(width - kept, kept), inside(count, kept)
                    values = plt.load(source.at[at, from_heads, columns], mask=mask)
                    plt.store(target.at[at, to_heads, columns], values, mask=mask)

    dtypes = [x.dtype for x in sources] if in_place else [sources[0].dtype] * len(heads)
    flat = [x.reshape(m, -1, width) for x in sources]
    angles = [x.reshape(m, 1, half) for x in (cos, sin)]
    outputs = triton_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, n, width), dtype) for n, dtype in zip(heads, dtypes)],
        grid=(pl.cdiv(m, tokens),),
        in_specs=[WHOLE] * (len(flat) + 2),
        out_specs=[WHOLE] * len(heads),
        input_output_aliases={i: i for i in range(len(flat))} if in_place else {},
        num_warps=_WARPS,
        name=name,
    )(*flat, *angles)
    return [x.reshape(b, t, -1, width) for x in outputs]


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    """(first, count) of pieces of `count` heads, each a power of two and at most `_MAX_HEADS`."""
    first = 0
    while first < count:
        size = min(1 << ((count - first).bit_length() - 1), _MAX_HEADS)
        yield first, size
        first += size
