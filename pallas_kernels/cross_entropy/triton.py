"""Softmax and its gradient of a chunk of logits as two Pallas kernels through Triton.

Why they exist: XLA passes over the logits three times, for their maxima, their sums and their gradient, and these are
the largest array of a step. Here maximum and sum are made in one pass, each thread with its own of both, and a second
one makes the gradient in the dtype that the products with it take. Numerics: float32, exponentials to base 2, the
gradient rounded once. Refuses a vocabulary that lies on several devices, whose sums must be put together in between.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Float32, Int

from pallas_kernels._triton import WHOLE, gpu_reason, triton_call

# Columns that a program works on at a time, 16 to a thread.
_TILE, _COLUMNS_PER_WARP = 4096, 512
# Below any logit, and finite: the difference of two of them is no NaN.
_LOWEST = -3e38


def unsupported_reason(logits: int, on_several_devices: bool) -> str | None:
    """Why these kernels cannot run here on a chunk of so many logits, or None."""
    if on_several_devices:
        return "the vocabulary lies on several devices"
    if logits >= 2**31:
        return f"{logits} logits at a time are addressed with more than 32 bits"
    return gpu_reason()


def softmax_triton(
    products: Float32[Array, "M V"],
    target: Int[Array, M],
    weight: Float32[Array, M],
    dtype: Any,
    scale: float,
    cap: float | None,
) -> tuple[Float32[Array, M], Float[Array, "M V"]]:
    """weight * -log softmax(logits)[target], and its gradient with respect to the products in `dtype`.

    The logits are the products times `scale`, then soft-capped.
    """
    sums = _log_sum_exp(products, scale, cap)
    picked = scale * jnp.take_along_axis(products, target[:, None], axis=1)[:, 0]
    if cap is not None:
        picked = cap * jnp.tanh(picked / cap)
    return weight * (sums - picked), _gradient(products, sums, target, weight, dtype, scale, cap)


def _log_sum_exp(logits: Array, scale: float, cap: float | None) -> Array:
    m, v = logits.shape
    tile = _tile(v)

    def kernel(logits_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0)

        def step(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            highest, total = carry
            value = _load(logits_ref, row, index * tile, tile, v, scale, cap)[0] * math.log2(math.e)
            higher = jnp.maximum(highest, value)
            return higher, total * jnp.exp2(highest - higher) + jnp.exp2(value - higher)

        start = jnp.full((tile,), _LOWEST, jnp.float32), jnp.zeros((tile,), jnp.float32)
        highest, total = lax.fori_loop(0, pl.cdiv(v, tile), step, start)
        top = jnp.max(highest)
        sums = jnp.sum(total * jnp.exp2(highest - top))
        plt.store(out_ref.at[row], (top + jnp.log2(sums)) * math.log(2.0))

    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m,), jnp.float32),
        grid=(m,),
        in_specs=[WHOLE],
        out_specs=WHOLE,
        num_warps=max(tile // _COLUMNS_PER_WARP, 1),
        name="log_sum_exp",
    )(logits)


def _gradient(
    logits: Array, sums: Array, target: Array, weight: Array, dtype: Any, scale: float, cap: float | None
) -> Array:
    m, v = logits.shape
    tile = _tile(v)
    tiles = pl.cdiv(v, tile)

    def kernel(logits_ref: Any, sums_ref: Any, target_ref: Any, weight_ref: Any, out_ref: Any) -> None:
        start, row = pl.program_id(0) % tiles * tile, pl.program_id(0) // tiles
        value, slope = _load(logits_ref, row, start, tile, v, scale, cap)
        column = start + lax.iota(jnp.int32, tile)
        likely = jnp.exp2((value - plt.load(sums_ref.at[row])) * math.log2(math.e))
        gradient = likely - jnp.where(column == plt.load(target_ref.at[row]), 1.0, 0.0)
        gradient *= plt.load(weight_ref.at[row]) * slope
        plt.store(out_ref.at[row, pl.ds(start, tile)], gradient.astype(dtype), mask=_inside(start, tile, v))

    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, v), dtype),
        grid=(tiles * m,),
        in_specs=[WHOLE] * 4,
        out_specs=WHOLE,
        num_warps=max(tile // _COLUMNS_PER_WARP, 1),
        name="softmax_gradient",
    )(logits, sums, target, weight)


def _tile(v: int) -> int:
    return min(_TILE, pl.next_power_of_2(v))


def _inside(start: Array, tile: int, v: int) -> Array | None:
    """Which of these columns exist; None if all do."""
    return None if v % tile == 0 else start + lax.iota(jnp.int32, tile) < v


def _load(
    ref: Any, row: Array, start: Array, tile: int, v: int, scale: float, cap: float | None
) -> tuple[Array, Array | float]:
    """Logits after scale and soft-cap, and their slope by those before; where there is no column, the lowest."""
    inside = _inside(start, tile, v)
    other = None if inside is None else _LOWEST
    value = plt.load(ref.at[row, pl.ds(start, tile)], mask=inside, other=other)
    if cap is None:
        return (value if scale == 1.0 else scale * value), scale
    # tanh by its definition, of the smaller exponential.
    small = jnp.exp2((-2.0 * math.log2(math.e) * abs(scale) / cap) * jnp.abs(value))
    tanh = (1.0 - small) / (1.0 + small)
    capped = cap * jnp.where(value * scale < 0, -tanh, tanh)
    if inside is not None:
        capped = jnp.where(inside, capped, _LOWEST)
    return capped, scale * (1.0 - tanh * tanh)
