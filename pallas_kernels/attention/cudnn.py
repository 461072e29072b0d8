"""Causal attention through cuDNN's flash kernels, by way of `jax.nn.dot_product_attention`.

Why it exists: the fastest causal attention on NVIDIA GPUs. Rows of one document take O(T) memory. For packed rows the
documents' mask is given as a matrix of T x T numbers a row, and no block of it is skipped, which is twice the time of
unpacked rows and a third of the sliced implementation's. Gradients of queries are added up in any order.
Limits: float16 and bfloat16, head widths that are multiples of 8 up to 128 (256 on Hopper and newer), compute
capability 8.0 and newer, masks up to 512 MiB, no soft-cap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._device import compute_capability
from pallas_kernels.attention.reference import visible

MASK_BUDGET_BYTES = 512 * 2**20


def unsupported_reason(q: Array, segment_ids: Array | None, cap: float | None) -> str | None:
    """Why cuDNN cannot serve this call, in words, or None when it can."""
    capability = compute_capability()
    if capability is None:
        return "needs an NVIDIA GPU"
    if capability < 8.0:
        return f"needs compute capability 8.0 or newer, this GPU has {capability}"
    mask_bytes = 0 if segment_ids is None else 2 * segment_ids.size * segment_ids.shape[1]
    if mask_bytes > MASK_BUDGET_BYTES:
        return f"its mask of packed documents would take {mask_bytes / 2**20:.0f} MiB, over 512"
    if segment_ids is not None and q.shape[1] % 2:
        return f"takes packed rows of even lengths only, not {q.shape[1]}"
    if cap is not None:
        return "has no soft-cap of the scores"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    widest = 256 if capability >= 9.0 else 128
    if q.shape[-1] > widest or q.shape[-1] % 8:
        return f"takes head widths that are multiples of 8 up to {widest}, not {q.shape[-1]}"
    return None


def attention_cudnn(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float, window: int | None) -> Array:
    """See `pallas_kernels.attention.api.attention`."""
    mask = left = None
    if segment_ids is not None:
        # The window too goes into the matrix, which is there anyway.
        index = jnp.arange(q.shape[1])
        mask = visible(index, index, segment_ids, segment_ids, window)[:, None]
    elif window is not None:
        left = (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=left, implementation="cudnn"
    )
