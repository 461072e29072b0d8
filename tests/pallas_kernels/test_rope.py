"""Rotary embedding against complex float64 arithmetic, in every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import StackLayer
from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.rope import rope, split_rope, split_rope_into_cache

IMPLEMENTATIONS = ("xla", "triton")


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def normal(*shape: int, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed_angles(b: int, t: int, half: int) -> np.ndarray:
    """Of tokens whose positions start again within a row, as those of packed documents do."""
    positions = np.stack([np.r_[0 : t - i - 1, 0 : i + 1] for i in range(b)])
    return positions[..., None] * (10000.0 ** (-np.arange(half) / half))


def turned(x: jax.Array, angles: np.ndarray, sign: int = 1) -> np.ndarray:
    x, half = np.asarray(x, np.float64), angles.shape[-1]
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(sign * 1j * angles)[:, :, None]
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], axis=-1)


def cos_sin(angles: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


# heads, kv_heads, head width, rotated pairs
SHAPES = [(9, 3, 64, 32), (5, 1, 80, 10), (3, 2, 24, 12), (40, 8, 16, 8)]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], implementation: str) -> None:
    n, kv, h, half = shape
    angles = packed_angles(2, 7, half)
    cos, sin = cos_sin(angles)
    q, k, dq, dk = (normal(2, 7, heads, h, seed=seed) for seed, heads in enumerate((n, kv, n, kv)))
    out, pullback = jax.vjp(lambda q, k: rope(q, k, cos, sin, implementation=implementation), q, k)
    expected = [turned(q, angles), turned(k, angles), turned(dq, angles, -1), turned(dk, angles, -1)]
    for actual, wanted in zip((*out, *pullback((dq, dk))), expected):
        np.testing.assert_allclose(actual, wanted, atol=2e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_split_is_a_rotation_of_one_array_and_its_gradient_is_one_array(
    shape: tuple[int, ...], implementation: str
) -> None:
    n, kv, h, half = shape
    angles = packed_angles(2, 5, half)
    cos, sin = cos_sin(angles)
    qkv = normal(2, 5, (n + 2 * kv) * h)
    split = lambda x: split_rope(x, cos, sin, heads=n, kv_heads=kv, implementation=implementation)  # noqa: E731
    out, pullback = jax.vjp(split, qkv)
    q, k, v = np.split(np.asarray(qkv).reshape(2, 5, -1, h), (n, n + kv), axis=2)
    for actual, wanted in zip(out, (turned(q, angles), turned(k, angles), v)):
        np.testing.assert_allclose(actual, wanted, atol=2e-6)
    # A rotation's transpose is its inverse.
    np.testing.assert_allclose(pullback(out)[0], qkv, atol=2e-6)


@pytest.mark.usefixtures("interpreter")
def test_bfloat16_is_rounded_once() -> None:
    angles = packed_angles(1, 9, 16)
    cos, sin = cos_sin(angles)
    q, k = normal(1, 9, 4, 32, dtype=jnp.bfloat16), normal(1, 9, 2, 32, dtype=jnp.bfloat16, seed=1)
    for implementation in IMPLEMENTATIONS:
        for actual, x in zip(rope(q, k, cos, sin, implementation=implementation), (q, k)):
            assert actual.dtype == jnp.bfloat16
            exact = turned(x, angles)
            # The float32 error before rounding counts where two parts cancel.
            np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=2.0**-8, atol=1e-6)


def test_products_depend_on_differences_of_positions() -> None:
    cos, sin = cos_sin(np.arange(9)[None, :, None] * (10000.0 ** (-np.arange(4) / 4)))
    q, k = (jnp.broadcast_to(normal(1, 1, 2, 8, seed=seed), (1, 9, 2, 8)) for seed in range(2))
    products = np.einsum("btnh,bsnh->bnts", *rope(q, k, cos, sin))
    np.testing.assert_allclose(products[0, :, 2:, 2:], products[0, :, :-2, :-2], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(32, 8, 128, 64), (9, 3, 64, 32), (40, 8, 80, 16)])
def test_kernels_lower_for_a_gpu_and_rope_works_in_place(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    n, kv, h, half = shape
    struct = jax.ShapeDtypeStruct
    angles = struct((3, 7, half), jnp.float32)
    in_place = partial(rope, implementation="triton")
    text = lower_for_cuda(in_place, struct((3, 7, n, h), dtype), struct((3, 7, kv, h), dtype), angles, angles)
    assert (text.count("stablehlo.custom_call"), text.count("#stablehlo.output_operand_alias<")) == (1, 2)

    def gradient(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        out, pullback = jax.vjp(lambda x: split_rope(x, cos, sin, heads=n, kv_heads=kv), qkv)
        return pullback(out)[0]

    text = lower_for_cuda(gradient, struct((3, 7, (n + 2 * kv) * h), dtype), angles, angles)
    assert text.count("stablehlo.custom_call") == 2


def test_what_does_not_fit_is_refused() -> None:
    angles = normal(1, 2, 3)
    with pytest.raises(ValueError, match="at most half of the head width 4"):
        rope(normal(1, 2, 1, 4), normal(1, 2, 1, 4), angles, angles)
    with pytest.raises(ValueError, match="must be"):
        rope(normal(1, 2, 1, 8), normal(1, 3, 1, 8), angles, angles)
    with pytest.raises(ValueError, match=r"2 x 1 heads of one width"):
        split_rope(normal(1, 2, 9), angles, angles, heads=2, kv_heads=1)


# The whole head and a part of it; a half that is no power of two; more queries than keys, and as many.
@pytest.mark.parametrize(("heads", "width", "half"), [((8, 2), 64, 32), ((3, 1), 96, 48), ((4, 4), 80, 16)])
def test_one_token_goes_into_its_cache(heads: tuple[int, int], width: int, half: int) -> None:
    """To the bit as through XLA; all else in the caches stays."""
    rng = np.random.default_rng(half)
    n, kv = heads
    qkv = jnp.asarray(rng.standard_normal((2, 1, (n + 2 * kv) * width)), jnp.bfloat16)
    caches = [StackLayer(jnp.asarray(rng.standard_normal((3, 2, 20, kv, width)), jnp.bfloat16), 1) for _ in "kv"]
    angles = rng.standard_normal((2, 1, half))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    with interpreted():
        ours = split_rope_into_cache(qkv, cos, sin, *caches, jnp.int32(7), heads=n, implementation="triton")
    theirs = split_rope_into_cache(qkv, cos, sin, *caches, jnp.int32(7), heads=n, implementation="xla")
    for got, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(got, wanted)

    def step(qkv: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
        layers = StackLayer(keys, 2), StackLayer(values, 2)
        return split_rope_into_cache(qkv, cos, sin, *layers, start, heads=n, implementation="triton")

    text = lower_for_cuda(step, qkv, *(cache.stack for cache in caches), jnp.int32(0))
    assert "rope_into_cache" in text
