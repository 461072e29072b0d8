"""Causal attention on Hopper, as Pallas Mosaic GPU kernels.

Why it exists: tiles as in `triton`, at the speed that Hopper's own instructions give. One warpgroup loads tiles by TMA;
two multiply them by `wgmma`, and while one has the tensor cores the other takes exponentials (FlashAttention-3,
arXiv:2407.08608). As many programs as there are multiprocessors take the tiles of queries one after the other, those
with the most to do first, and load the next while they end one; backward, tiles of keys have a program each. Tiles that
no query sees are not visited, and of those that every query sees whole nothing is masked; gradients of keys sum over
the heads they serve, so results repeat bit for bit, and nothing is kept beside one number a query and head.
Numerics: as `triton`, and tanh is the hardware's, off by 2**-11 of its result. Gradients of heads wider than 128, whose
sums do not fit the registers, are `triton`'s.
Refuses what is not bfloat16 or float16, head widths that are no multiple of 64 up to 256, GPUs other than Hopper, and
JAX before 0.11.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels._mosaic import hopper_reason
from pallas_kernels.attention import triton
from pallas_kernels.attention.mosaic_backward import d_keys, d_queries
from pallas_kernels.attention.mosaic_forward import forward
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.attention.xla import Form

# By pass, then by head width up to which they serve.
TILES = {
    "forward": {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 128, 8, 2), 256: Tiles(128, 64, 8, 2)},
    "keys": {64: Tiles(64, 128, 8, 3), 128: Tiles(64, 128, 8, 2)},
    "queries": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3)},
}
# The widest heads with which whole rows have been timed beside cuDNN's.
TIMED_WIDTH = 128
# Rows that are copied as one: what a tile of theirs in shared memory counts.
_ROWS = 8


def unsupported_reason(q: Array) -> str | None:
    """Why q cannot be served here, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 64 or not 64 <= q.shape[-1] <= 256:
        return f"it takes head widths that are multiples of 64 up to 256, not {q.shape[-1]}"
    if q.size == 0:
        return f"an array of shape {q.shape} holds nothing"
    return hopper_reason(interpretable=True)


def attention_mosaic(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> Array:
    """See `pallas_kernels.attention.api.attention`; q, k and v are of one length."""
    t = q.shape[1]
    if t % _ROWS == 0:
        return _attention(q, k, v, segment_ids, form)
    filling = (0, 0), (0, -t % _ROWS)
    q, k, v = (jnp.pad(x, (*filling, (0, 0), (0, 0))) for x in (q, k, v))
    return _attention(q, k, v, None if segment_ids is None else jnp.pad(segment_ids, filling), form)[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> Array:
    return forward(q, k, v, segment_ids, form, tiling("forward", q))[0]


def _fwd(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form) -> tuple[Array, tuple[Any, ...]]:
    out, log_sums = forward(q, k, v, segment_ids, form, tiling("forward", q))
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "attention_sums")
    return out, (q, k, v, segment_ids, out, log_sums)


def _bwd(form: Form, residuals: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, segment_ids, out, log_sums = residuals
    t = q.shape[1]
    if q.shape[-1] > max(TILES["keys"]):
        return triton.backward(form, (q, k, v, segment_ids, out, log_sums[..., :t]), d_out)
    along = triton.along_queries(d_out, out)
    along = jnp.pad(along, ((0, 0), (0, 0), (0, log_sums.shape[2] - t)))
    shared = q, k, v, d_out, log_sums, along, segment_ids, form
    return d_queries(*shared, tiling("queries", q)), *d_keys(*shared, tiling("keys", q)), None


_attention.defvjp(_fwd, _bwd)


def tiling(name: str, q: Array) -> Tiles:
    """The tiling of a pass."""
    return next(tiles for widest, tiles in TILES[name].items() if q.shape[3] <= widest)
