"""A frozen NF4 linear layer: the public function and its gradient."""

from __future__ import annotations

import functools
import math

import jax
from jax import Array
from jaxtyping import Float

from pallas_kernels._dispatch import choose
from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4_matmul import mosaic_gpu, triton, xla

_FORWARD = {
    "mosaic": mosaic_gpu.nf4_matmul_mosaic,
    "triton": triton.nf4_matmul_triton,
    "xla": xla.nf4_matmul_xla,
}
# Few rows have no kernel of their own on the way back: the weight is decoded before the product.
_BACKWARD = {
    "mosaic": triton.nf4_matmul_transposed_triton,
    "triton": triton.nf4_matmul_transposed_triton,
    "xla": xla.nf4_matmul_transposed_xla,
}


def nf4_matmul(x: Float[Array, "*M K"], w: NF4Tensor, implementation: str | None = None) -> Float[Array, "*M N"]:
    """y = x W^T, differentiable in x. The weight is frozen: its gradient is zero and is never computed.

    The backward pass decodes the weight again (dX = dY W) and keeps neither x nor a decoded weight for it.

    Args:
        x: [..., K], bfloat16, float16 or float32; products are of this dtype, sums are float32.
        w: one packed weight of shape (N, K). For a stack of layers, scan over it.
        implementation: "mosaic", "triton", "xla", or None to choose.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    if w.stack_shape:
        raise ValueError(f"nf4_matmul: w is a stack {w.stack_shape} of weights; take one, or scan over the stack")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"nf4_matmul: x {x.shape} must end in {w.shape[1]}, the width of the weight {w.shape}")
    candidates = {
        "mosaic": lambda: mosaic_gpu.unsupported_reason(x, w),
        "triton": lambda: triton.unsupported_reason(x, w),
        "xla": lambda: xla.unsupported_reason(x, w),
    }
    if implementation is None and not mosaic_gpu.is_fastest(math.prod(x.shape[:-1]), w):
        del candidates["mosaic"]
    return _matmul(x, w, choose("nf4_matmul", implementation, candidates))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, w: NF4Tensor, implementation: str) -> Array:
    return _FORWARD[implementation](x, w)


def _forward(x: Array, w: NF4Tensor, implementation: str) -> tuple[Array, NF4Tensor]:
    return _matmul(x, w, implementation), w


def _backward(implementation: str, w: NF4Tensor, dy: Array) -> tuple[Array, None]:
    return _BACKWARD[implementation](dy, w), None


_matmul.defvjp(_forward, _backward)
