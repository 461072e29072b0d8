"""Products of few rows with several packed weights, which they decode: through Mosaic where it can, else Triton."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._stack import StackLayer, picked
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.nf4_matmul import mosaic_few, mosaic_gpu, triton


def fused_group(
    x: Array,
    weights: Sequence[NF4Tensor | NF4Layer],
    ups: Sequence[Array | StackLayer | None] | None = None,
    low: Array | None = None,
) -> Array:
    """[M, K] times several weights [N, K]: their results beside each other, [M, sum of N] in x's dtype.

    x is one that `triton.can_fuse` all of them with. ups: of each weight a matrix [N, R] that is added along the
    contraction, or None. low: [M, sum of R], what the ups are multiplied by, in their order; of one row also several
    that add up.
    """
    if mosaic_few.unsupported_reason(x, weights, ups) is None:
        return mosaic_few.few_rows(x, weights, ups, low)
    if x.shape[0] == 1:
        return triton.fused_row(x, weights, ups, low if low is None else jnp.sum(low, axis=0, keepdims=True))
    parts = [_several_rows(x, w) for w in weights]
    column = 0
    for i, up in enumerate(ups or ()):
        if up is not None:
            assert low is not None
            some = low[:, column : column + up.shape[1]].astype(x.dtype)
            parts[i] += lax.dot_general(some, picked(up).astype(x.dtype), (((1,), (1,)), ((), ())))
            column += up.shape[1]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _several_rows(x: Array, w: NF4Tensor | NF4Layer) -> Array:
    if mosaic_gpu.is_fastest(x.shape[0], w) and mosaic_gpu.unsupported_reason(x, w) is None:
        return mosaic_gpu.nf4_matmul_mosaic(x, w)
    return triton.fused_product(x, w)
