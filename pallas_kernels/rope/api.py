"""Rotary position embedding: the public functions."""

from __future__ import annotations

from functools import partial

import jax
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels._dispatch import choose
from pallas_kernels._stack import StackLayer, written
from pallas_kernels.rope.into_cache import split_into_cache_triton
from pallas_kernels.rope.triton import join_triton, rotate_triton, split_triton, unsupported_reason
from pallas_kernels.rope.xla import join_xla, rotate_xla, split_xla

_ROTATE = {"triton": rotate_triton, "xla": rotate_xla}
_SPLIT = {"triton": split_triton, "xla": split_xla}
_JOIN = {"triton": join_triton, "xla": join_xla}


def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Rotate queries and keys by their tokens' angles; differentiable in both, not in the angles.

    Args:
        q: [B, T, N, H]. k: [B, T, K, H], K heads that queries share.
        cos: [B, T, half], float32, cosines of position times inverse frequency, half at most H / 2: of each head the
            first 2 half elements are rotated. sin: likewise.
        implementation: "triton", "xla", or None to choose.

    Raises:
        ValueError: shapes do not fit together, or the implementation's name is unknown.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rope: q {q.shape} and k {k.shape} must be [B, T, N, H] and [B, T, K, H]")
    _check_angles("rope", q, cos, sin)
    # XLA first: with arrays of their own to write it takes half of the kernel's time (H200: 44 us against 87).
    candidates = {"xla": lambda: None, "triton": lambda: unsupported_reason(q, k, cos, sin)}
    return _rotate(q, k, cos, sin, choose("rope", implementation, candidates))


def split_rope(
    qkv: Float[Array, "B T width"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    heads: int,
    kv_heads: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Cut queries, keys and values out of one array and rotate the first two; the gradient is one array again.

    Args:
        qkv: [B, T, (N + 2K) H], queries, keys and values beside each other.
        cos, sin, implementation: as in `rope`.
        heads: N. kv_heads: K.

    Returns:
        q [B, T, N, H], k and v [B, T, K, H].

    Raises: as `rope`.
    """
    b, t, width = qkv.shape
    total = heads + 2 * kv_heads
    if width % total:
        raise ValueError(f"split_rope: qkv {qkv.shape} must hold {heads} + 2 x {kv_heads} heads of one width")
    by_head = qkv.reshape(b, t, total, width // total)
    _check_angles("split_rope", by_head, cos, sin)
    candidates = {"triton": lambda: unsupported_reason(qkv, cos, sin), "xla": lambda: None}
    return _split(by_head, cos, sin, heads, kv_heads, choose("split_rope", implementation, candidates))


def split_rope_into_cache(
    qkv: Float[Array, "B T width"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    keys: StackLayer,
    values: StackLayer,
    start: Int[Array, ""] | int,
    *,
    heads: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
    """`split_rope` of new tokens in generation, whose keys and values go into a cache; without gradients.

    Args:
        qkv: [B, T, (N + 2K) H], queries, keys and values beside each other.
        cos, sin: as in `rope`. heads: N.
        keys, values: one layer [B, S, K, H] each of the caches of all layers.
        start: index in the cache of the first new token.
        implementation: "triton" (of one new token), "xla", or None to choose.

    Returns:
        The rotated queries, and the stacks of keys and values with the new tokens.

    Raises: as `rope`.
    """
    kv_heads = keys.shape[2]
    one = "it serves one new token" if qkv.shape[1] != 1 else None
    candidates = {"triton": lambda: one or unsupported_reason(qkv, cos, sin, keys.stack), "xla": lambda: None}
    if choose("split_rope_into_cache", implementation, candidates) == "triton":
        by_head = qkv.reshape(*qkv.shape[:2], heads + 2 * kv_heads, -1)
        _check_angles("split_rope_into_cache", by_head, cos, sin)
        return split_into_cache_triton(by_head, cos, sin, heads, keys, values, start)
    q, k, v = split_rope(qkv, cos, sin, heads=heads, kv_heads=kv_heads)
    return q, written(keys, k, start), written(values, v, start)


def _check_angles(op: str, x: Array, cos: Array, sin: Array) -> None:
    if cos.shape != sin.shape or cos.shape[:2] != x.shape[:2] or 2 * cos.shape[2] > x.shape[3]:
        raise ValueError(
            f"{op}: cos {cos.shape} and sin {sin.shape} must be [B, T, half] for {x.shape[:2]} tokens, with half at "
            f"most half of the head width {x.shape[3]}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rotate(q: Array, k: Array, cos: Array, sin: Array, implementation: str) -> tuple[Array, Array]:
    return _ROTATE[implementation](q, k, cos, sin)


def _rotate_fwd(q: Array, k: Array, cos: Array, sin: Array, implementation: str) -> tuple[tuple[Array, Array], tuple]:
    return _rotate(q, k, cos, sin, implementation), (cos, sin)


def _rotate_bwd(
    implementation: str, angles: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    cos, sin = angles
    return *_ROTATE[implementation](*cotangents, cos, -sin), None, None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _split(
    qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int, implementation: str
) -> tuple[Array, Array, Array]:
    return _SPLIT[implementation](qkv, cos, sin, heads, kv_heads)


def _split_fwd(
    qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int, implementation: str
) -> tuple[tuple[Array, Array, Array], tuple]:
    return _split(qkv, cos, sin, heads, kv_heads, implementation), (cos, sin)


def _split_bwd(
    heads: int, kv_heads: int, implementation: str, angles: tuple[Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, None, None]:
    cos, sin = angles
    return _JOIN[implementation](*cotangents, cos, -sin), None, None


_split.defvjp(_split_fwd, _split_bwd)
