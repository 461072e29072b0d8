"""The attention sub-block of a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array, lax
from jaxtyping import Float

from jaxtune.linear import linear, split_key
from jaxtune.models.config import DecoderConfig
from jaxtune.models.context import Context
from pallas_kernels.attention import attention, cached_attention
from pallas_kernels.rope import rope

Cache = dict[str, Array]


def self_attention(
    h: Float[Array, "B T D"],
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
    context: Context,
    config: DecoderConfig,
    key: Array | None,
    cache: Cache | None,
    layer: Array | int = 0,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Queries, keys and values, rotated; attention within documents; output projection.

    Args:
        h: [B, T, D], normalised.
        base, adapter: this layer's `self_attn` subtrees.
        cache: {"k", "v"}: [L, B, S, K, H] of all layers, which this layer's new tokens are written into; None in
            training.
        layer: this layer's index in the cache.

    Returns:
        [B, T, D], and the cache with the new tokens.
    """
    b, t, _ = h.shape

    def project(index: int, name: str, x: Array) -> Array:
        return linear(x, base[name], adapter.get(name), context.adaptation, split_key(key, index))

    q = project(0, "q_proj", h).reshape(b, t, config.num_heads, config.head_dim)
    k = project(1, "k_proj", h).reshape(b, t, config.num_kv_heads, config.head_dim)
    v = project(2, "v_proj", h).reshape(b, t, config.num_kv_heads, config.head_dim)
    q, k = rope(q, k, context.cos, context.sin)
    if cache is None:
        out = attention(q, k, v, segment_ids=context.segment_ids)
    else:
        at = (layer, 0, context.cache_start, 0, 0)
        cache = {
            "k": lax.dynamic_update_slice(cache["k"], k[None], at),
            "v": lax.dynamic_update_slice(cache["v"], v[None], at),
        }
        keys, values = (lax.dynamic_index_in_dim(cache[name], layer, keepdims=False) for name in ("k", "v"))
        out = cached_attention(q, keys, values, context.cache_start, first=context.cache_first)
    return project(3, "o_proj", out.reshape(b, t, -1)), cache
