"""RoPE against float64 truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope import rope

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_rope_rotates_pairs_by_position_and_keeps_products_of_differences() -> None:
    q, k = normal(1, 9, 2, 8), normal(1, 9, 2, 8)
    angles = np.arange(9)[None, :, None] * (10000.0 ** (-np.arange(4) / 4))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    q_rotated, k_rotated = rope(q, k, cos, sin)
    pairs = lambda x: np.asarray(x[..., :4], np.complex128) + 1j * np.asarray(x[..., 4:], np.complex128)  # noqa: E731
    np.testing.assert_allclose(pairs(q_rotated), pairs(q) * np.exp(1j * angles)[:, :, None], atol=1e-6)
    same = jnp.broadcast_to(q[:, :1], q.shape), jnp.broadcast_to(k[:, :1], k.shape)
    a, b = rope(*same, cos, sin)
    products = np.einsum("btnh,bsnh->bnts", a, b)
    np.testing.assert_allclose(products[0, :, 2:, 2:], products[0, :, :-2, :-2], atol=1e-5)
    assert k_rotated.shape == k.shape


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must be twice"):
        rope(normal(1, 2, 1, 8), normal(1, 2, 1, 8), normal(1, 2, 3), normal(1, 2, 3))
