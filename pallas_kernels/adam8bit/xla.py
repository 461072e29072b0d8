"""AdamW with block-wise 8-bit moments through XLA: the reference with a faster search for the nearest map entry.

Why it exists: a binary search reads memory eight times in sequence for each of an element's two moments. The entries
are spaced about logarithmically, so the leading bits of a float32 already tell the code to within one: one look-up by
sign, exponent and seven bits of fraction, one comparison with one midpoint. Codes are the reference's exactly, for
every float32 in [-1, 1]. 168 million LoRA parameters in 14 stacks take 2.0 ms on an H200, with a binary search 8.6 ms.

Limits: XLA makes two passes, one for the scales and one for the codes, with both moments in float32 between them. On a
GPU that is 8 bytes for each element of the largest parameter, and about twice the traffic of a single pass.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int, UInt8

from pallas_kernels.adam8bit.reference import Moments8bit, adam8bit_reference, midpoints

DROPPED_BITS = 16  # of a float32's 23 bits of fraction: cells are 1/128 of an octave
FIRST_CELL = (127 - 23) << (23 - DROPPED_BITS)  # holds all magnitudes below 2^-23 as well
LAST_CELL = 127 << (23 - DROPPED_BITS)  # begins at 1.0


@functools.cache
def _codes_by_cell(signed: bool) -> np.ndarray:
    """The lowest code within each cell, uint8: magnitudes ascending, then where signed their negatives likewise."""
    edges = (np.arange(FIRST_CELL, LAST_CELL + 2, dtype=np.int32) << DROPPED_BITS).view(np.float32)
    edges[0] = 0.0
    inner, outer = edges[:-1], np.nextafter(edges[1:], np.float32(0))
    codes = np.searchsorted(midpoints(signed), [inner, outer])
    if signed:
        codes = np.concatenate([codes, np.searchsorted(midpoints(signed), [-inner, -outer])], axis=1)
    assert np.abs(codes[0] - codes[1]).max() <= 1, "a cell holds more than one midpoint"
    return codes.min(axis=0).astype(np.uint8)


def nearest_code(x: Float32[Array, "*shape"], signed: bool) -> UInt8[Array, "*shape"]:
    """Index of the map entry nearest to x, for |x| <= 1."""
    cells = jnp.asarray(_codes_by_cell(signed))
    magnitude = lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> DROPPED_BITS
    cell = jnp.clip(magnitude, FIRST_CELL, LAST_CELL) - FIRST_CELL
    if signed:
        cell = jnp.where(x < 0, cell + cells.size // 2, cell)
    low = cells.at[cell].get(mode="promise_in_bounds")
    above = jnp.asarray(np.append(midpoints(signed), np.float32(np.inf))).at[low].get(mode="promise_in_bounds")
    return low + (x > above).astype(jnp.uint8)


def adam8bit_xla(
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
    apply: bool,
) -> tuple[Float[Array, "*shape"], Moments8bit]:
    """See `pallas_kernels.adam8bit.api.adam8bit`."""
    hyper = (learning_rate, b1, b2, eps, weight_decay, block_size)
    update, moments = adam8bit_reference(grad, moments, param, step, *hyper, nearest=nearest_code)
    return (param + update).astype(param.dtype) if apply else update, moments
