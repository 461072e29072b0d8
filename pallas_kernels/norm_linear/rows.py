"""The row kernels around norm_linear's product: normalisation into a padded operand, and its backward pass.

Why they exist: the product wants its operand with room for the adapter's columns, and the backward pass adds up three
gradients (of the product, of the adapter, of the residual stream); XLA would pass over each array again. One program a
row; statistics and sums in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import triton_call

_WARPS = 8
_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def _columns(width: int) -> tuple[Array, Array]:
    """Indices of the columns, filled up to a power of two, and which of them are inside."""
    columns = lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(width),), 0)
    return columns, columns < width


def norm_forward(
    x: Array, residual: Array | None, scale: Array, *, eps: float, unit_offset: bool, tail: int
) -> tuple[Array, Array, Array]:
    """Normalised x + residual as [M, D + tail] with a tail of zeros, 1 / rms as float32 [M], and the sum [M, D]."""
    m, d = x.shape

    def kernel(*refs: Any) -> None:
        inputs, (h_ref, inverse_ref, *sum_ref) = refs[: 2 + has_residual], refs[2 + has_residual :]
        row = pl.program_id(0)
        at, inside = _columns(d)
        value = plt.load(inputs[0].at[row, at], mask=inside, other=0.0).astype(jnp.float32)
        if has_residual:
            value += plt.load(inputs[1].at[row, at], mask=inside, other=0.0).astype(jnp.float32)
            value = value.astype(x.dtype)
            plt.store(sum_ref[0].at[row, at], value, mask=inside)
            value = value.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.sum(value * value) / d + eps)
        weight = plt.load(inputs[-1].at[at], mask=inside, other=0.0)
        normalised = value * inverse
        if unit_offset:
            h = (normalised * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
        else:
            h = normalised.astype(x.dtype) * weight.astype(x.dtype)
        plt.store(h_ref.at[row, at], h, mask=inside)
        if tail:
            behind, inside = _columns(tail)
            plt.store(h_ref.at[row, d + behind], jnp.zeros(behind.shape, x.dtype), mask=inside)
        plt.store(inverse_ref.at[row], inverse)

    has_residual = residual is not None
    shape = jax.ShapeDtypeStruct
    outputs = [shape((m, d + tail), x.dtype), shape((m,), jnp.float32)]
    outputs += [shape((m, d), x.dtype)] * has_residual
    operands = [x, residual, scale] if has_residual else [x, scale]
    call = triton_call(
        kernel,
        out_shape=outputs,
        grid=(m,),
        in_specs=[_WHOLE] * len(operands),
        out_specs=[_WHOLE] * len(outputs),
        num_warps=_WARPS,
        name="norm_forward",
    )
    h, inverse, *total = call(*operands)
    return h, inverse, total[0] if has_residual else x


def norm_backward(
    x: Array, scale: Array, inverse: Array, dh: Array, extra: Array | None, d_residual: Array, *, unit_offset: bool
) -> Array:
    """The gradient of `norm_forward`'s x (and residual), [M, D] in x's dtype.

    Args:
        x: [M, D], the sum that was normalised. inverse: its 1 / rms.
        dh: [M, D or wider], gradient of the normalised row; columns beyond D are not read.
        extra: [M, D], added to dh, or None. d_residual: [M, D], gradient of the sum by its other path.
    """
    m, d = x.shape

    def kernel(x_ref: Any, scale_ref: Any, inverse_ref: Any, residual_ref: Any, dh_ref: Any, *rest: Any) -> None:
        row = pl.program_id(0)
        at, inside = _columns(d)

        def load(ref: Any) -> Array:
            return plt.load(ref.at[row, at], mask=inside, other=0.0).astype(jnp.float32)

        dy = load(dh_ref)
        if extra is not None:
            dy += load(rest[0])
        weight = plt.load(scale_ref.at[at], mask=inside, other=0.0).astype(jnp.float32)
        dy *= 1.0 + weight if unit_offset else weight
        inverse_rms = plt.load(inverse_ref.at[row])
        normalised = load(x_ref) * inverse_rms
        along = jnp.sum(dy * normalised) / d
        dx = inverse_rms * (dy - normalised * along) + load(residual_ref)
        plt.store(rest[-1].at[row, at], dx.astype(x.dtype), mask=inside)

    operands = [x, scale, inverse, d_residual, dh] + ([] if extra is None else [extra])
    return triton_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, d), x.dtype),
        grid=(m,),
        in_specs=[_WHOLE] * len(operands),
        out_specs=_WHOLE,
        num_warps=_WARPS,
        name="norm_backward",
    )(*operands)
