"""Products with an NF4 weight through XLA.

Why it exists: it runs everywhere and is what the kernels are measured against. XLA does not fuse the decoding into a
matrix product, so the weight exists once in x's dtype while its product runs. Numerics: sums in float32, rounded once
to x's dtype. Refuses nothing.
"""

from __future__ import annotations

from jax import Array, lax

from pallas_kernels.nf4 import NF4Tensor, dequantize


def unsupported_reason(x: Array, w: NF4Tensor) -> str | None:
    """Why x and w cannot be multiplied here: never."""
    return None


def nf4_matmul_xla(x: Array, w: NF4Tensor) -> Array:
    """y = x W^T: [..., in] -> [..., out]."""
    return _dot(x, w, weight_axis=1)


def nf4_matmul_transposed_xla(dy: Array, w: NF4Tensor) -> Array:
    """dX = dY W: [..., out] -> [..., in]."""
    return _dot(dy, w, weight_axis=0)


def _dot(x: Array, w: NF4Tensor, weight_axis: int) -> Array:
    # Tied to x, or XLA may decode the weights of all layers before the first one runs.
    w, x = lax.optimization_barrier((w, x))
    contract = (((x.ndim - 1,), (weight_axis,)), ((), ()))
    weight = dequantize(w, x.dtype, implementation="xla")
    # Asked for in float32 and rounded afterwards, cuBLAS writes float32 and XLA converts it in a pass of its own.
    return lax.dot_general(x, weight, contract)
