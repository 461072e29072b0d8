"""The definition: decode the weight, then multiply."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4.reference import nf4_dequantize_reference


def nf4_matmul_reference(x: Float[Array, "*M K"], w: NF4Tensor) -> Float[Array, "*M N"]:
    """x W^T with W decoded into x's dtype and products summed in float32; the result has x's dtype."""
    weight = nf4_dequantize_reference(w, x.dtype.name)
    return jnp.einsum("...k,nk->...n", x, weight, preferred_element_type=jnp.float32).astype(x.dtype)
