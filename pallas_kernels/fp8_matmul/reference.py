"""Products in 8-bit floating point by their definition: what is rounded, and where.

e4m3 (arXiv:2209.05433) has a sign, 4 bits of exponent and 3 of mantissa: 448 is its largest number, 2**-9 its smallest.
A row of a matrix is divided by its largest absolute value over 448, in float32, and rounded. A packed weight is rounded
once, from its table's values and its blocks' scales, without the 16-bit weight in between; its rows' scales are bounds,
from the largest scale of a block in the row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels.nf4 import NF4_TABLE, NF4Tensor
from pallas_kernels.nf4.reference import decode_scales

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
# Of a row's largest value, below which the row counts as zeros: keeps its scale above float32's subnormal numbers.
_LEAST = float(np.finfo(np.float32).tiny) * LARGEST


def row_scales(largest: Any) -> Any:
    """Of rows with these largest absolute values, float32 [...]."""
    return jnp.maximum(largest, _LEAST) / LARGEST


def quantize_rows_reference(x: Float[Array, "M K"]) -> tuple[Any, Any]:
    """e4m3 [M, K] and float32 [M], whose product is x but for rounding."""
    x = x.astype(jnp.float32)
    scale = row_scales(jnp.max(jnp.abs(x), axis=1))
    return (x / scale[:, None]).astype(E4M3), scale


def decode_reference(w: NF4Tensor | Array) -> tuple[Any, Any]:
    """e4m3 [N, K] and float32 [N] of a frozen weight."""
    if not isinstance(w, NF4Tensor):
        return quantize_rows_reference(w)
    n, k = w.shape
    codes = jnp.stack([w.codes >> 4, w.codes & 15], axis=-1).reshape(-1)[: n * k]
    of_blocks = jnp.repeat(jnp.asarray(decode_scales(w)), w.block_size)[: n * k].reshape(n, k)
    scale = row_scales(jnp.max(jnp.abs(of_blocks), axis=1))
    values = jnp.asarray(NF4_TABLE)[codes].reshape(n, k) * (of_blocks / scale[:, None])
    return values.astype(E4M3), scale


@jax.custom_vjp
def fp8_matmul_reference(x: Float[Array, "M K"], w: NF4Tensor | Array) -> Float[Array, "M N"]:
    """x W^T, summed in float32; its gradient is that of the transposed product below."""
    (x8, x_scale), (w8, w_scale) = quantize_rows_reference(x), decode_reference(w)
    return (_exact(x8, w8.T) * x_scale[:, None] * w_scale).astype(x.dtype)


def fp8_transposed_reference(dy: Float[Array, "M N"], w: NF4Tensor | Array) -> Float[Array, "M K"]:
    """dy W, where the scales of W's rows, which are summed over, are taken into dy before it is rounded."""
    w8, w_scale = decode_reference(w)
    dy8, dy_scale = quantize_rows_reference(dy.astype(jnp.float32) * w_scale)
    return (_exact(dy8, w8) * dy_scale[:, None]).astype(dy.dtype)


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


fp8_matmul_reference.defvjp(
    lambda x, w: (fp8_matmul_reference(x, w), w), lambda w, dy: (fp8_transposed_reference(dy, w), None)
)
