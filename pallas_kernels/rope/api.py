"""Rotary position embedding: the public function."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from pallas_kernels._dispatch import choose
from pallas_kernels.rope.reference import rope_reference


def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Rotate queries and keys by their tokens' angles.

    Args:
        q: [B, T, N, H]. k: [B, T, K, H], K heads that queries share.
        cos: [B, T, H/2], float32, cosines of position times inverse frequency. sin: likewise.
        implementation: "xla", or None to choose.

    Raises:
        ValueError: the head width is not twice that of cos and sin.
    """
    if not q.shape[-1] == k.shape[-1] == 2 * cos.shape[-1] == 2 * sin.shape[-1]:
        raise ValueError(
            f"rope: head widths {q.shape[-1]} (q) and {k.shape[-1]} (k) must be twice those of "
            f"cos ({cos.shape[-1]}) and sin ({sin.shape[-1]})"
        )
    choose("rope", implementation, {"xla": lambda: None})
    return rope_reference(q, cos, sin), rope_reference(k, cos, sin)
