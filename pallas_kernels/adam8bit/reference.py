"""AdamW with block-wise 8-bit moments by its definition (arXiv:2110.02861), in bitsandbytes' format.

A tensor's moments are read flat and cut into blocks; the last one may be short. A block is held as one float32 scale,
its absolute maximum, and for each element the uint8 index of the nearest entry of a sorted map of 256 values: a signed
map for the first moment, an unsigned one for the second. Each map is dynamic: within a decade its entries are evenly
spaced, and each decade further down has half as many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, UInt8

DECADES = 7


class Moments8bit(NamedTuple):
    """Both moments of one tensor of P elements, or of a stack of such tensors: no block crosses two of them.

    m_codes, v_codes: uint8 [*stack, P], indices into the signed and the unsigned map, in the tensor's row-major order.
    m_absmax, v_absmax: float32 [*stack, ceil(P / block_size)], the blocks' scales.
    """

    m_codes: UInt8[Array, "*stack P"]
    m_absmax: Float32[Array, "*stack blocks"]
    v_codes: UInt8[Array, "*stack P"]
    v_absmax: Float32[Array, "*stack blocks"]


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The map's 256 values, float32, ascending; equal to bitsandbytes' `create_dynamic_map` bit for bit.

    Zero, one, and for each decade the centres of equal parts of [0.1, 1] times a power of ten: 1, 2, .. 64 parts and
    their negatives where signed (the least value is then -0.99296874, not -1), else 2, 4, .. 128 parts.
    """
    values: list[np.ndarray] = [np.array([0.0, 1.0], np.float32)]
    for decade in range(DECADES):
        parts = 2 ** (decade if signed else decade + 1)
        # Edges are counted from the nearer end with one rounding each: the last bit of the map depends on it.
        low, high = np.float32(0.1), np.float32(1.0)
        width, i = float((high - low) / np.float32(parts)), np.arange(parts + 1)
        edges = np.where(i < (parts + 1) // 2, float(low) + width * i, float(high) - width * (parts - i))
        edges = edges.astype(np.float32)
        centres = np.float32(10.0 ** (decade - DECADES + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [centres, -centres] if signed else [centres]
    return np.sort(np.concatenate(values))


@functools.cache
def midpoints(signed: bool) -> np.ndarray:
    """Float32 [255]: x is nearer to entry i + 1 than to entry i exactly when x > midpoints[i]; a tie goes to entry i.

    Midpoints that float32 cannot hold are rounded down, which leaves that comparison exact for every float32 x.
    """
    entries = dynamic_map(signed).astype(np.float64)
    exact = (entries[:-1] + entries[1:]) / 2
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def nearest_code(x: Float32[Array, "*shape"], signed: bool) -> UInt8[Array, "*shape"]:
    """Index of the map entry nearest to x: the number of midpoints below it."""
    return jnp.searchsorted(midpoints(signed), x, side="left").astype(jnp.uint8)


def _blocks(x: Array, block_size: int) -> Array:
    """[*stack, P] -> [*stack, ceil(P / block_size), block_size], filled up with zeros."""
    p = x.shape[-1]
    fill = -p % block_size
    if fill:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    return x.reshape(*x.shape[:-1], -1, block_size)


def _flat(blocks: Array, p: int) -> Array:
    """The inverse of `_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :p]


def quantize_blockwise(
    x: Float[Array, "*stack P"],
    *,
    signed: bool,
    block_size: int = 256,
    nearest: Callable[[Array, bool], Array] = nearest_code,
) -> tuple[UInt8[Array, "*stack P"], Float32[Array, "*stack blocks"]]:
    """Codes and scales of x, whose values must not be negative where the map is unsigned.

    A block whose maximum is below the least normal float32 gets the code of zero throughout.
    """
    blocks = _blocks(x.astype(jnp.float32), block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scale = jnp.where(absmax < np.finfo(np.float32).tiny, jnp.inf, absmax)
    return _flat(nearest(blocks / scale[..., None], signed), x.shape[-1]), absmax


def dequantize_blockwise(
    codes: UInt8[Array, "*stack P"], absmax: Float32[Array, "*stack blocks"], *, signed: bool, block_size: int = 256
) -> Float32[Array, "*stack P"]:
    """The float32 values that codes and scales stand for."""
    entries = jnp.asarray(dynamic_map(signed))
    # uint8 codes cannot leave a table of 256 entries.
    values = entries.at[_blocks(codes, block_size)].get(mode="promise_in_bounds")
    return _flat(values * absmax[..., None], codes.shape[-1])


def bias_correction(beta: float, step: Int[Array, ""]) -> Float32[Array, ""]:
    """1 - beta^step, in a form that keeps float32's full precision where beta^step is close to 1."""
    return -jnp.expm1(step * jnp.float32(math.log(beta))) if beta else jnp.float32(1.0)


def adam_direction(
    m: Float32[Array, "*shape"], v: Float32[Array, "*shape"], step: Int[Array, ""], b1: float, b2: float, eps: float
) -> Float32[Array, "*shape"]:
    """Adam's step for a learning rate of one: the moments, bias-corrected, as m / (sqrt(v) + eps) (arXiv:1412.6980)."""
    root = jnp.sqrt(v) / jnp.sqrt(bias_correction(b2, step))
    return m / (root + eps) / bias_correction(b1, step)


def adam8bit_reference(
    grad: Float[Array, "*shape"],
    moments: Moments8bit,
    param: Float[Array, "*shape"],
    step: Int[Array, ""],
    learning_rate: Float[Array, ""] | float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    block_size: int,
    nearest: Callable[[Array, bool], Array] = nearest_code,
) -> tuple[Float32[Array, "*shape"], Moments8bit]:
    """See `pallas_kernels.adam8bit.api.adam8bit`. The step uses the new moments as they are before quantisation."""
    g = grad.astype(jnp.float32).reshape(moments.m_codes.shape)
    m = dequantize_blockwise(moments.m_codes, moments.m_absmax, signed=True, block_size=block_size)
    v = dequantize_blockwise(moments.v_codes, moments.v_absmax, signed=False, block_size=block_size)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * jnp.square(g)
    update = adam_direction(m, v, step, b1, b2, eps).reshape(param.shape)
    if weight_decay:
        update += weight_decay * param.astype(jnp.float32)
    m_codes, m_absmax = quantize_blockwise(m, signed=True, block_size=block_size, nearest=nearest)
    v_codes, v_absmax = quantize_blockwise(v, signed=False, block_size=block_size, nearest=nearest)
    return -learning_rate * update, Moments8bit(m_codes, m_absmax, v_codes, v_absmax)
