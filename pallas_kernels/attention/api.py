"""Causal self-attention: the public function."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels._dispatch import choose
from pallas_kernels._stack import StackLayer, picked
from pallas_kernels.attention import cached, cudnn, mosaic_gpu, triton
from pallas_kernels.attention.parts import AttentionParts
from pallas_kernels.attention.reference import attention_reference, visible
from pallas_kernels.attention.xla import Form, attention_xla
from pallas_kernels.rope import split_rope_into_cache


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    cap: float | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Each query attends to the keys at or before it in its row and, with `segment_ids`, in its own document only.

    Args:
        q: [B, T, N, H]. k, v: [B, T, K, H], where K divides N.
        segment_ids: int32 [B, T], one number per document of a packed row; None where every row is one document
            (padding behind it needs no mask: nothing before it sees it).
        window: keys that a query sees at most, its own among them (a sliding window); None for all before it.
        cap: soft-cap of the scores, cap * tanh(score / cap); None for none.
        scale: factor on the scores; 1 / sqrt(H) when None.
        deterministic: the same bits each time, gradients too: without cuDNN.
        implementation: "cudnn", "triton", "mosaic", "xla", or None to choose.

    Returns:
        [B, T, N, H] in q's dtype. Rows of padding hold finite values without meaning.

    Raises:
        ValueError: shapes do not fit together, or window or cap is not positive.
        NotImplementedError: a named implementation cannot serve this call; the text says why.
    """
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} must be [B, T, N, H], [B, T, K, H], [B, T, K, H] "
            "with N a multiple of K"
        )
    _check_positive(window, cap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= q.shape[1]:
        window = None
    any_order = "its backward pass adds up gradients in any order" if deterministic else None
    candidates = {
        "cudnn": lambda: any_order or cudnn.unsupported_reason(q, segment_ids, cap),
        "mosaic": lambda: mosaic_gpu.unsupported_reason(q),
        "triton": lambda: triton.unsupported_reason(q),
        "xla": lambda: None,
    }
    # On an H200 tiles through Triton take half of cuDNN's time for packed rows, and half as long again for whole ones;
    # through Mosaic 0.7 of Triton's for packed rows and 0.85 of cuDNN's for whole ones.
    packed = segment_ids is not None
    first = ["mosaic"] * (packed or q.shape[-1] <= mosaic_gpu.TIMED_WIDTH) + ["triton"] * packed
    candidates = {name: candidates[name] for name in first} | candidates
    chosen = choose("attention", implementation, candidates)
    if chosen == "cudnn":
        return cudnn.attention_cudnn(q, k, v, segment_ids, scale, window)
    run: Any = {"triton": triton.attention_triton, "mosaic": mosaic_gpu.attention_mosaic, "xla": attention_xla}[chosen]
    return run(q, k, v, segment_ids, Form(scale, window, cap))


def cached_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "B S K H"] | StackLayer,
    v_cache: Float[Array, "B S K H"] | StackLayer,
    start: Int[Array, ""] | int,
    *,
    first: Int[Array, " B"] | None = None,
    window: int | None = None,
    cap: float | None = None,
    scale: float | None = None,
    joined: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | AttentionParts:
    """Attention of T new tokens to a cache that already holds them: query t stands at index start + t of the S cached
    keys.

    Args:
        q: [B, T, N, H]. k_cache, v_cache: [B, S, K, H], each an array or a layer of a stack; what lies behind index
            start + t is not seen by query t.
        start: tokens that were in the cache before.
        first: int32 [B], index of each row's first token: what stands before it is padding, which no query sees; None
            where no row is padded. Queries that are padding themselves give finite values without meaning.
        window, cap, scale: as in `attention`.
        joined: without it, what was computed in parts is returned in parts, which the linear layer behind puts together
            (`grouped_lora_linear`).
        implementation: "triton", "xla", or None to choose.

    Returns:
        [B, T, N, H] in q's dtype, or where it is not `joined` its parts.

    Raises:
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_positive(window, cap)
    candidates = {"triton": lambda: cached.unsupported_reason(q, k_cache), "xla": lambda: None}
    if choose("cached_attention", implementation, candidates) == "triton":
        out = cached.cached_attention_triton(q, k_cache, v_cache, start, first, Form(scale, window, cap))
        return out.joined().reshape(q.shape) if joined and isinstance(out, AttentionParts) else out
    keys = jnp.arange(k_cache.shape[1])
    mask = visible(start + jnp.arange(q.shape[1]), keys, None, None, window)
    if first is not None:
        mask = mask & (keys >= first[:, None])[:, None]
    return attention_reference(q, picked(k_cache), picked(v_cache), mask, scale, cap)


def attention_into_cache(
    qkv: Float[Array, "B T width"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    keys: StackLayer,
    values: StackLayer,
    start: Int[Array, ""] | int,
    *,
    heads: int,
    first: Int[Array, " B"] | None = None,
    window: int | None = None,
    cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"] | AttentionParts, Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
    """`split_rope_into_cache` of new tokens and their `cached_attention`, not joined.

    Args:
        qkv, cos, sin, keys, values, start, heads: as in `split_rope_into_cache`.
        first, window, cap, scale: as in `cached_attention`.
        implementation: "triton" (of one new token, in one launch), "apart" (the two ops, each as it chooses), or None
            to choose.

    Returns:
        Attention's output or its parts, and the stacks of keys and values with the new tokens.

    Raises: as `split_rope_into_cache`.
    """
    kv_heads, width = keys.shape[2:]
    by_head = qkv.reshape(*qkv.shape[:2], heads + 2 * kv_heads, width)
    one = "it serves one new token" if qkv.shape[1] != 1 else None
    candidates = {"triton": lambda: one or cached.unsupported_reason(by_head, keys), "apart": lambda: None}
    if choose("attention_into_cache", implementation, candidates) == "triton":
        _check_positive(window, cap)
        form = Form(width**-0.5 if scale is None else scale, window, cap)
        out, (k, v) = cached.attention_into_cache_triton(by_head, cos, sin, keys, values, start, first, form)
        return out, k, v
    q, k, v = split_rope_into_cache(qkv, cos, sin, keys, values, start, heads=heads)
    layers = StackLayer(k, keys.index), StackLayer(v, values.index)
    settings: Any = {"first": first, "window": window, "cap": cap, "scale": scale, "joined": False}
    return cached_attention(q, *layers, start, **settings), k, v


def _check_positive(window: int | None, cap: float | None) -> None:
    if (window is not None and window < 1) or (cap is not None and not cap > 0):
        raise ValueError(f"attention: window is {window} and cap is {cap}; both must be positive, or None for none")
