"""Causal attention through cuDNN's flash kernels, by way of `jax.nn.dot_product_attention`.

Why it exists: the fastest causal attention on NVIDIA GPUs for rows of one document, with O(T) memory and deterministic
results. Limits: float16 and bfloat16, head widths that are multiples of 8 up to 128 (256 on Hopper and newer), compute
capability 8.0 and newer, no document mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._device import compute_capability


def unsupported_reason(q: Array, segment_ids: Array | None) -> str | None:
    """Why cuDNN cannot serve this call, in words, or None when it can."""
    capability = compute_capability()
    if capability is None:
        return "needs an NVIDIA GPU"
    if capability < 8.0:
        return f"needs compute capability 8.0 or newer, this GPU has {capability}"
    if segment_ids is not None:
        return "takes no document mask"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    widest = 256 if capability >= 9.0 else 128
    if q.shape[-1] > widest or q.shape[-1] % 8:
        return f"takes head widths that are multiples of 8 up to {widest}, not {q.shape[-1]}"
    return None


def attention_cudnn(q: Array, k: Array, v: Array, scale: float) -> Array:
    """See `pallas_kernels.attention.api.attention`."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
