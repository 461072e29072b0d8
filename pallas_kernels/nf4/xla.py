"""NF4 decoding through XLA.

Why it exists: it runs everywhere and is what the kernels are measured against. One fused loop reads the codes and
writes the weight. Codes are read as uint4, which XLA unpacks while loading; nibbles cut out of uint8 by shift, stack
and reshape took more than twice as long on an H200. Numerics: the reference's, to the bit. Refuses nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.nf4.reference import NF4_TABLE, scale_values
from pallas_kernels.nf4.tensor import NF4Tensor


def unsupported_reason(t: NF4Tensor) -> str | None:
    """Why t cannot be decoded here: never."""
    return None


def unpacked(codes: Array) -> Array:
    """Bytes [...] as their codes, uint4 [..., 2]."""
    if jax.__version_info__ < (0, 11):
        # XLA of jax 0.10 casts constants wrongly, such as a weight that a jitted function closes over.
        codes = lax.optimization_barrier(codes)
    # The cast gives the low nibble first, the format wants the high one.
    return lax.bitcast_convert_type(codes, jnp.uint4)[..., ::-1]


def nf4_dequantize_xla(t: NF4Tensor, dtype: str) -> Any:
    """See `pallas_kernels.nf4.api.dequantize`."""
    codes = unpacked(t.codes).reshape(*t.stack_shape, -1)
    values = jnp.asarray(NF4_TABLE).at[codes].get(mode="promise_in_bounds")
    return scale_values(values, t, dtype).reshape(*t.stack_shape, *t.shape)
