"""RMSNorm and RoPE against float64 truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import rope

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_values_and_gradient(unit_offset: bool) -> None:
    x, scale, dy = normal(3, 7, 45), normal(45), normal(3, 7, 45)
    y, pullback = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=1e-5, unit_offset=unit_offset), x, scale)
    dx, d_scale = pullback(dy)
    factor = np.asarray(scale, np.float64) + unit_offset
    x_f64, g_f64 = np.asarray(x, np.float64), np.asarray(dy, np.float64) * factor
    inverse = 1 / np.sqrt((x_f64**2).mean(-1, keepdims=True) + 1e-5)
    normalised = x_f64 * inverse
    np.testing.assert_allclose(y, normalised * factor, atol=2e-6)
    expected = inverse * (g_f64 - normalised * (g_f64 * normalised).mean(-1, keepdims=True))
    np.testing.assert_allclose(dx, expected, atol=3e-6)
    np.testing.assert_allclose(d_scale, (np.asarray(dy) * normalised).sum((0, 1)), atol=1e-5)


def test_rms_norm_in_bfloat16_keeps_its_statistics_in_float32() -> None:
    x = (normal(64, 300) * 100).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    # One rounding to bfloat16 (8 bits) after exact statistics.
    np.testing.assert_allclose(np.asarray(rms_norm(x, jnp.ones(300)), np.float64), exact, rtol=2.0**-8)
    # 1 + scale is not rounded to bfloat16, which could not tell it from 1.
    tiny = jnp.full(300, 2.0**-10, jnp.bfloat16)
    offset = np.asarray(rms_norm(x, tiny, unit_offset=True), np.float64)
    np.testing.assert_allclose(offset, exact * (1 + 2.0**-10), rtol=2.0**-8)
    assert (offset != np.asarray(rms_norm(x, jnp.ones(300)), np.float64)).any()


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
    with pytest.raises(ValueError, match="must agree"):
        rms_norm(normal(2, 4), normal(5))
    with pytest.raises(ValueError, match="must be twice"):
        rope(normal(1, 2, 1, 8), normal(1, 2, 1, 8), normal(1, 2, 3), normal(1, 2, 3))
