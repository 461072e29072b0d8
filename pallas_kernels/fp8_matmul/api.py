"""Products with a frozen weight in 8-bit floating point: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from pallas_kernels._dispatch import choose
from pallas_kernels.fp8_matmul import triton, triton_rows, xla
from pallas_kernels.fp8_matmul.reference import quantize_rows_reference
from pallas_kernels.nf4 import NF4Layer, NF4Tensor

Weight = Any


def fp8_matmul(
    x: Float[Array, "*M K"], w: Float[Array, "N K"] | NF4Tensor, *, implementation: str | None = None
) -> Float[Array, "*M N"]:
    """x W^T with both operands rounded to e4m3, differentiable in x; the weight is frozen.

    Rows of x, and rows of W, have a scale each. The gradient is dY W in e4m3 as well: W's scales, which lie along the
    sum there, are multiplied into dY, whose rows then get scales of their own. Relative to the exact product the error
    of either is about 3.8 % on normally distributed operands.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        w: [N, K], dense or packed; a packed one is decoded to e4m3 straight, once in each pass.
        implementation: of decoding, of rounding rows and of finishing results: "triton", "xla", or None to choose for
            each. The product between is XLA's: through cuBLASLt in 8 bits on GPUs of compute capability 8.9 and newer,
            of widened operands elsewhere.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    if isinstance(w, NF4Tensor) and w.stack_shape:
        raise ValueError(f"fp8_matmul: w is a stack {w.stack_shape} of weights; take one, or scan over the stack")
    if x.ndim == 0 or len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"fp8_matmul: x {x.shape} must end in the width of the weight [N, K] = {w.shape}")
    _choose([w], implementation)
    y = _matmul(x.reshape(-1, x.shape[-1]), w, implementation)
    return y.reshape(*x.shape[:-1], -1)


def quantize_rows(x: Float[Array, "M K"]) -> tuple[Any, Float32[Array, M]]:
    """e4m3 values [M, K] and the scale of each row, whose product is x but for rounding.

    A row's largest absolute value becomes 448, e4m3's largest. Rows of zeros have a small positive scale; what is not
    finite stays so.
    """
    return _quantize(x, None, None)


def decode_fp8(
    weights: Sequence[Weight], *, transposed: bool = False, implementation: str | None = None
) -> tuple[Any, Float32[Array, N]]:
    """Frozen weights of one width as one e4m3 matrix [sum of N, K], and the scale of each of its rows.

    Args:
        weights: NF4Tensor, NF4Layer or dense [N, K], each.
        transposed: give the matrix as [K, sum of N]; scales belong to the same rows.
        implementation: "triton", "xla", or None to choose.

    Raises:
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    if _choose(weights, implementation) == "triton":
        return triton.decode_triton(list(weights), transposed)
    parts = [_decoded(w, transposed) for w in weights]
    if len(parts) == 1:
        return parts[0]
    values, scales = zip(*parts, strict=True)
    return jnp.concatenate(values, axis=1 if transposed else 0), jnp.concatenate(scales)


def fp8_product(
    x: Float[Array, "M K"],
    weights: Sequence[Weight],
    *,
    low_rank: tuple[Float[Array, "M R"], Float[Array, "N R"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """x W^T of the weights below each other, without a gradient rule; see `fp8_matmul`.

    low_rank: t and b, in x's dtype: their product t b^T, which is not in 8 bits, is added.
    """
    w, w_scale = decode_fp8(weights, implementation=implementation)
    values, scale = _quantize(x, None, implementation)
    return _finish(xla.raw_product(values, w, x.dtype), scale, w_scale, low_rank, x.dtype, implementation)


def fp8_product_transposed(
    dy: Float[Array, "M N"],
    weights: Sequence[Weight],
    *,
    low_rank: tuple[Float[Array, "M R"], Float[Array, "K R"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M K"]:
    """dY W of the weights below each other, without a gradient rule; low_rank as in `fp8_product`."""
    w, w_scale = decode_fp8(weights, transposed=True, implementation=implementation)
    values, scale = _quantize(dy, w_scale, implementation)
    return _finish(xla.raw_product(values, w, dy.dtype), scale, None, low_rank, dy.dtype, implementation)


def _quantize(x: Array, column_scale: Array | None, implementation: str | None) -> tuple[Any, Array]:
    candidates = {"triton": lambda: triton_rows.quantize_reason(x), "xla": lambda: None}
    if choose("fp8_matmul, rows rounded", implementation, candidates) == "triton":
        return triton_rows.quantize_rows_triton(x, column_scale)
    return quantize_rows_reference(x if column_scale is None else x.astype(jnp.float32) * column_scale)


def _finish(
    raw: Array,
    row_scale: Array,
    column_scale: Array | None,
    low_rank: xla.LowRank | None,
    dtype: Any,
    implementation: str | None,
) -> Array:
    candidates = {"triton": triton_rows.finish_reason, "xla": lambda: None}
    if choose("fp8_matmul, results finished", implementation, candidates) == "triton":
        return triton_rows.finish_triton(raw, row_scale, column_scale, low_rank).astype(dtype)
    return xla.finish_xla(raw, row_scale, column_scale, low_rank, dtype)


def _choose(weights: Sequence[Weight], implementation: str | None) -> str:
    reasons = (triton.unsupported_reason(w) for w in weights)
    candidates = {"triton": lambda: next(filter(None, reasons), None), "xla": lambda: None}
    return choose("fp8_matmul", implementation, candidates)


def _decoded(w: Weight, transposed: bool) -> tuple[Array, Array]:
    if isinstance(w, NF4Layer):
        w = w.picked()
    if isinstance(w, NF4Tensor):
        return xla.decode_xla(w, transposed)
    values, scale = quantize_rows(w)
    return (values.T if transposed else values), scale


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, w: Weight, implementation: str | None) -> Array:
    return fp8_product(x, [w], implementation=implementation)


def _forward(x: Array, w: Weight, implementation: str | None) -> tuple[Array, Weight]:
    return _matmul(x, w, implementation), w


def _backward(implementation: str | None, w: Weight, dy: Array) -> tuple[Array, None]:
    return fp8_product_transposed(dy, [w], implementation=implementation), None


_matmul.defvjp(_forward, _backward)
