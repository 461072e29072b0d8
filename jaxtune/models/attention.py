"""The attention sub-block of a decoder layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxtune.linear import Linears
from jaxtune.models.config import DecoderConfig
from jaxtune.models.context import Cache, Context
from jaxtune.models.norm import norm
from pallas_kernels._stack import StackLayer, written
from pallas_kernels.attention import AttentionParts, attention, attention_into_cache, cached_attention
from pallas_kernels.rope import rope, split_rope


def self_attention(
    qkv: Float[Array, "B T width"],
    linears: Linears,
    context: Context,
    config: DecoderConfig,
    cache: Cache | None,
    layer: Array | int = 0,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Queries and keys rotated; attention within documents; output projection.

    Args:
        qkv: [B, T, (N + 2 K) H], queries, keys and values beside each other.
        linears: this layer's, for the output projection.
        cache: {"k", "v"}: [L, B, S, K, H] of all layers, which this layer's new tokens are written into; None in
            training.
        layer: this layer's index in the cache.

    Returns:
        [B, T, D], and the cache with the new tokens.
    """
    b, t, _ = qkv.shape
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if "q_norm" in linears.base:
        by_head = qkv.reshape(b, t, heads + 2 * kv_heads, config.head_dim)
        q, k, v = jnp.split(by_head, (heads, heads + kv_heads), axis=2)
        q, k = norm(q, linears.base["q_norm"], config), norm(k, linears.base["k_norm"], config)
        q, k = rope(q, k, context.cos, context.sin)
    elif cache is None:
        q, k, v = split_rope(qkv, context.cos, context.sin, heads=heads, kv_heads=kv_heads)
    form: Any = {"window": context.window, "cap": config.attention_cap, "scale": config.attention_scale}
    in_training = form | {"deterministic": context.deterministic}
    out: Any
    if cache is None and context.parts is not None:
        q, k, v = context.parts.by_heads(q, k, v)
        segment_ids = context.parts.rows(context.segment_ids)
        out = context.parts.by_tokens(attention(q, k, v, segment_ids=segment_ids, **in_training))
    elif cache is None:
        out = attention(q, k, v, segment_ids=context.segment_ids, **in_training)
    else:
        keys, values = (StackLayer(cache[name], layer) for name in ("k", "v"))
        start, seen = context.cache_start, form | {"first": context.cache_first}
        if "q_norm" in linears.base:
            cache = {"k": written(keys, k, start), "v": written(values, v, start)}
            keys, values = (StackLayer(cache[name], layer) for name in ("k", "v"))
            out = cached_attention(q, keys, values, start, joined=False, **seen)
        else:
            angles = context.cos, context.sin
            out, *new = attention_into_cache(qkv, *angles, keys, values, start, heads=heads, **seen)
            cache = dict(zip("kv", new, strict=True))
        if isinstance(out, AttentionParts):
            return linears.apply("o_proj", out), cache
    return linears.apply("o_proj", out.reshape(b, t, -1)), cache
