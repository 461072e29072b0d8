"""One new token of each row: its query rotated, its key (rotated, too) and value written into the cache, in one launch.

Why it exists: for one token the launch is what takes time, and XLA makes two more of it that write a kilobyte each.
Numerics: those of `split_rope`. Writes over the caches where the compiler can.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._stack import StackLayer
from pallas_kernels._triton import WHOLE, load_f32, triton_call


def split_into_cache_triton(
    qkv: Array, cos: Array, sin: Array, heads: int, keys: StackLayer, values: StackLayer, start: Array | int
) -> tuple[Array, Array, Array]:
    """See `pallas_kernels.rope.api.split_rope_into_cache`; qkv is [B, 1, N + 2 K, H]."""
    b, _, total, width = qkv.shape
    half, kv_heads = cos.shape[-1], (total - heads) // 2
    size = pl.next_power_of_2(half)

    def kernel(*refs: Any) -> None:
        start_ref, layer_ref, qkv_ref, cos_ref, sin_ref, _, _, q_ref, k_ref, v_ref = refs
        row, head = pl.program_id(0), pl.program_id(1)
        column = lax.iota(jnp.int32, size)
        inside = None if size == half else column < half
        cosine, sine = (load_f32(ref.at[row, column], inside) for ref in (cos_ref, sin_ref))

        def move(target: Any, place: tuple[Any, ...], rotated: bool) -> None:
            for first, last in ((0, 2 * half), (2 * half, width)):
                if first == last:
                    continue
                if rotated and first == 0:
                    x, y = (load_f32(qkv_ref.at[row, head, column + at], inside) for at in (0, half))
                    for at, value in ((0, x * cosine - y * sine), (half, y * cosine + x * sine)):
                        plt.store(target.at[(*place, column + at)], value.astype(target.dtype), mask=inside)
                else:
                    some = first + lax.iota(jnp.int32, pl.next_power_of_2(last - first))
                    mask = None if some.size == last - first else some < last
                    plt.store(target.at[(*place, some)], plt.load(qkv_ref.at[row, head, some], mask=mask), mask=mask)

        pl.when(head < heads)(lambda: move(q_ref, (row, head), True))
        at, layer = start_ref[0], layer_ref[0]
        is_key = (head >= heads) & (head < heads + kv_heads)
        pl.when(is_key)(lambda: move(k_ref, (layer, row, at, head - heads), True))
        pl.when(head >= heads + kv_heads)(lambda: move(v_ref, (layer, row, at, head - heads - kv_heads), False))

    caches = [keys.stack, values.stack]
    operands = [jnp.reshape(start, (1,)), jnp.reshape(keys.index, (1,)), qkv[:, 0], cos[:, 0], sin[:, 0], *caches]
    shapes = [jax.ShapeDtypeStruct((b, heads, width), qkv.dtype)]
    shapes += [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches]
    q, k, v = triton_call(
        kernel,
        out_shape=shapes,
        grid=(b, total),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * 3,
        input_output_aliases={5: 1, 6: 2},
        num_warps=1,
        name="rope_into_cache",
    )(*operands)
    return q[:, None], k, v
