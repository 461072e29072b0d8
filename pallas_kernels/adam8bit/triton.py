"""AdamW with block-wise 8-bit moments in one pass, as a Pallas kernel through Triton.

Why it exists: a block's moments stay in registers while its scale is found, where XLA writes both in float32 and reads
them again; and codes, scales and the parameter (or the gradient, for the update) are overwritten. Sixteen bytes a
parameter move, the least there is. Numerics: float32 as the reference, but the blocks are divided by their scales by
multiplying with the reciprocal, so that a value within rounding of two codes' midpoint may take the other one. Refuses
block sizes that are no power of two.

The nearest code needs no search: within a decade the map's entries are evenly spaced, so that one multiplication and
addition gives the code or the one below, and one comparison with a midpoint decides.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import WHOLE, row_kernel_reason, triton_call
from pallas_kernels.adam8bit.reference import DECADES, Moments8bit, bias_correction, dynamic_map, midpoints

# Elements that one program updates, and the code that stands for zero in the signed and the unsigned map.
_TILE, _WARPS = 2048, 4
_ZERO = {True: 127, False: 0}


def unsupported_reason(grad: Array, moments: Moments8bit, param: Array, block_size: int) -> str | None:
    """Why these operands cannot be served here, or None."""
    if block_size & (block_size - 1) or not 16 <= block_size <= 8192:
        return f"blocks of {block_size} elements are no power of two from 16 to 8192"
    if param.size >= 2**31:
        return f"{param.size} elements are more than it can address (2^31); cut the tensor"
    return row_kernel_reason(grad, param)


def adam8bit_triton(
    grad: Array,
    moments: Moments8bit,
    param: Array,
    step: Array,
    learning_rate: Array | float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    block_size: int,
    apply: bool,
) -> tuple[Array, Moments8bit]:
    """See `pallas_kernels.adam8bit.api.adam8bit`."""
    p = moments.m_codes.shape[-1]
    blocks = moments.m_absmax.shape[-1]
    per_program = max(_TILE // block_size, 1)
    needs_param = apply or bool(weight_decay)
    out_dtype = param.dtype if apply else jnp.float32

    def kernel(*refs: Any) -> None:
        inputs, (out_ref, *new_refs) = refs[:-5], refs[-5:]
        grad_ref, m_codes_ref, m_absmax_ref, v_codes_ref, v_absmax_ref, factors_ref = inputs[:6]
        tables = {True: inputs[6:8], False: inputs[8:10]}
        tensor, first = pl.program_id(0), pl.program_id(1) * per_program
        block = first + lax.iota(jnp.int32, per_program)
        element = block[:, None] * block_size + lax.iota(jnp.int32, block_size)[None, :]
        block_inside = None if blocks % per_program == 0 else block < blocks
        inside = None if p % (per_program * block_size) == 0 else element < p

        def load(ref: Any, other: float = 0) -> Array:
            return plt.load(ref.at[tensor, element], mask=inside, other=None if inside is None else other)

        def decoded(codes_ref: Any, absmax_ref: Any, signed: bool) -> Array:
            scale_other = None if block_inside is None else 0.0
            scale = plt.load(absmax_ref.at[tensor, block], mask=block_inside, other=scale_other)
            return plt.load(tables[signed][0].at[load(codes_ref, _ZERO[signed]).astype(jnp.int32)]) * scale[:, None]

        def encode(value: Array, codes_ref: Any, absmax_ref: Any, signed: bool) -> None:
            # As integers: Triton's maximum of floats passes over NaN, whose bits are above all others.
            bits = jnp.max(lax.bitcast_convert_type(jnp.abs(value), jnp.int32), axis=1)
            absmax = lax.bitcast_convert_type(bits, jnp.float32)
            reciprocal = jnp.where(absmax < np.finfo(np.float32).tiny, 0.0, 1.0 / absmax)
            codes = nearest_code(value * reciprocal[:, None], signed, tables[signed][1])
            plt.store(codes_ref.at[tensor, element], codes, mask=inside)
            plt.store(absmax_ref.at[tensor, block], absmax, mask=block_inside)

        rate, to_root, to_m, decay = (factors_ref[i] for i in range(4))
        g = load(grad_ref).astype(jnp.float32)
        m = b1 * decoded(m_codes_ref, m_absmax_ref, True) + (1 - b1) * g
        v = b2 * decoded(v_codes_ref, v_absmax_ref, False) + (1 - b2) * (g * g)
        update = to_m * (m / (jnp.sqrt(v) * to_root + eps))
        if needs_param:
            old = load(inputs[10]).astype(jnp.float32)
            update += decay * old
        new = old - rate * update if apply else -rate * update
        plt.store(out_ref.at[tensor, element], new.astype(out_dtype), mask=inside)
        encode(m, new_refs[0], new_refs[1], True)
        encode(v, new_refs[2], new_refs[3], False)

    root, first_moment = 1 / jnp.sqrt(bias_correction(b2, step)), 1 / bias_correction(b1, step)
    factors = jnp.stack([jnp.asarray(x, jnp.float32) for x in (learning_rate, root, first_moment, weight_decay)])
    state = [x.reshape(-1, x.shape[-1]) for x in moments]
    tables = [jnp.asarray(table(signed)) for signed in (True, False) for table in (dynamic_map, midpoints)]
    operands = [grad.reshape(-1, p), *state, factors, *tables, *([param.reshape(-1, p)] * needs_param)]
    # The result goes over the parameter it replaces, or over the gradient, which nobody reads after.
    over = {len(operands) - 1: 0} if apply else {0: 0} if grad.dtype == jnp.float32 else {}
    new, *state = triton_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((state[0].shape[0], p), out_dtype)]
        + [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
        grid=(state[0].shape[0], pl.cdiv(blocks, per_program)),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * 5,
        input_output_aliases={**over, 1: 1, 2: 2, 3: 3, 4: 4},
        num_warps=_WARPS,
        name="adam8bit",
    )(*operands)
    return new.reshape(param.shape), Moments8bit(*(x.reshape(old.shape) for x, old in zip(state, moments)))


def nearest_code(x: Array, signed: bool, midpoints_ref: Any) -> Array:
    """Index of the map entry nearest to x, for |x| <= 1, as uint8.

    Decade d holds [10^(d - 7), 10^(d - 6)) in n = 2^d parts (2^(d + 1) in the unsigned map), of ranks n to 2n - 1; zero
    is the rank before them all, one the rank after. What is rounded down here is half a part less than the rank's
    start, so that the right rank is this or the next, at the decades' ends too.
    """
    magnitude = jnp.abs(x) if signed else x
    factor, offset = (jnp.full_like(x, value) for value in _line(0, signed))
    for decade in range(1, DECADES):
        above = magnitude >= 10.0 ** (decade - DECADES)
        factor, offset = (jnp.where(above, new, old) for new, old in zip(_line(decade, signed), (factor, offset)))
    rank = (magnitude * factor + offset).astype(jnp.int32)
    low = jnp.where(x < 0, _ZERO[signed] - 1 - rank, _ZERO[signed] + rank) if signed else rank - 1
    low = jnp.clip(low, 0, 254)
    return (low + (x > plt.load(midpoints_ref.at[low])).astype(jnp.int32)).astype(jnp.uint8)


def _line(decade: int, signed: bool) -> tuple[float, float]:
    """Factor and offset from a magnitude in this decade to its rank less a half."""
    parts = 2.0 ** (decade if signed else decade + 1)
    return parts * 10.0 ** (DECADES - 1 - decade) / 0.9, parts * (1 - 0.1 / 0.9) - 0.5
