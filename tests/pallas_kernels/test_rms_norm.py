"""RMSNorm against float64 truth, in every implementation, and what its kernels become on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_forward

IMPLEMENTATIONS = ("xla", "triton")
EPS = 1e-5


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def normal(*shape: int, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def truth(x: jax.Array, scale: jax.Array, dy: jax.Array, unit_offset: bool = False) -> list[np.ndarray]:
    """The normalised rows, and the gradients of x and scale, in float64."""
    x_f64, factor, g_f64 = (np.asarray(v, np.float64) for v in (x, scale, dy))
    factor = factor + unit_offset
    inverse = 1 / np.sqrt((x_f64**2).mean(-1, keepdims=True) + EPS)
    normalised = x_f64 * inverse
    g = g_f64 * factor
    dx = inverse * (g - normalised * (g * normalised).mean(-1, keepdims=True))
    return [normalised * factor, dx, (g_f64 * normalised).reshape(-1, x.shape[-1]).sum(0)]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 45), (2, 5, 3, 64), (2, 5000)])
def test_values_and_gradients(shape: tuple[int, ...], unit_offset: bool, implementation: str) -> None:
    x, scale, dy = normal(*shape), normal(shape[-1], seed=1), normal(*shape, seed=2)
    kwargs = {"eps": EPS, "unit_offset": unit_offset, "implementation": implementation}
    y, pullback = jax.vjp(lambda x, scale: rms_norm(x, scale, **kwargs), x, scale)
    for actual, expected in zip((y, *pullback(dy)), truth(x, scale, dy, unit_offset)):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_residual_is_added_and_takes_the_same_gradient(implementation: str) -> None:
    x, residual, dy, d_total = (normal(5, 70, seed=seed) for seed in range(4))
    scale = normal(70, seed=4)
    (y, total), pullback = jax.vjp(
        lambda *args: add_rms_norm(*args, eps=EPS, implementation=implementation), x, residual, scale
    )
    np.testing.assert_array_equal(total, x + residual)
    expected, dx, d_scale = truth(total, scale, dy)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-5)
    gradients = pullback((dy, d_total))
    for actual, wanted in zip(gradients, (dx + np.asarray(d_total), dx + np.asarray(d_total), d_scale)):
        np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("width", "tail"), [(64, 24), (300, 3), (4096, 64)])
def test_room_behind_and_gradients_by_other_paths(width: int, tail: int) -> None:
    m = 5
    x, extra, d_total = (normal(m, width, seed=seed) for seed in range(3))
    scale, dy = normal(width, seed=3), normal(m, width + tail, seed=4).at[:, width:].set(jnp.nan)
    for implementation in IMPLEMENTATIONS:
        y, inverse_rms, total = rms_norm_forward(x, scale, eps=EPS, tail=tail, implementation=implementation)
        expected, dx, _ = truth(x, scale, dy[:, :width] + extra)
        assert y.shape == (m, width + tail)
        assert (inverse_rms.shape, inverse_rms.dtype) == ((m,), jnp.float32)
        assert not np.asarray(y[:, width:]).any()
        np.testing.assert_allclose(y[:, :width], expected, rtol=2e-6, atol=1e-5)
        np.testing.assert_array_equal(total, x)
        actual = rms_norm_backward(
            total, scale, inverse_rms, dy, extra=extra, d_total=d_total, implementation=implementation
        )
        np.testing.assert_allclose(actual, dx + np.asarray(d_total), rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_keeps_statistics_in_float32(implementation: str) -> None:
    x = (normal(64, 300) * 100).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    norm = lambda *args, **kwargs: np.asarray(  # noqa: E731
        rms_norm(*args, implementation=implementation, **kwargs), np.float64
    )
    # One rounding to bfloat16 (8 bits) after exact statistics.
    np.testing.assert_allclose(norm(x, jnp.ones(300)), exact, rtol=2.0**-8)
    # 1 + scale is not rounded to bfloat16, which could not tell it from 1.
    tiny = jnp.full(300, 2.0**-10, jnp.bfloat16)
    offset = norm(x, tiny, unit_offset=True)
    np.testing.assert_allclose(offset, exact * (1 + 2.0**-10), rtol=2.0**-8)
    assert (offset != norm(x, jnp.ones(300))).any()
    # The square of 60000 is no float16.
    large = jnp.full((2, 40), 60000.0, jnp.float16)
    np.testing.assert_array_equal(norm(large, jnp.ones(40)), np.ones((2, 40)))


@pytest.mark.usefixtures("interpreter")
def test_both_implementations_round_alike() -> None:
    x, residual, dy = (normal(6, 200, dtype=jnp.bfloat16, seed=seed) for seed in range(3))
    scale = normal(200, seed=3)
    results = {}
    for implementation in IMPLEMENTATIONS:
        y, inverse_rms, total = rms_norm_forward(x, scale, residual=residual, implementation=implementation)
        dx = rms_norm_backward(total, scale, inverse_rms, dy, implementation=implementation)
        results[implementation] = [np.asarray(v, np.float32) for v in (y, total, dx)]
    for ours, reference in zip(results["triton"], results["xla"]):
        # Sums in another order may move a float32 across a rounding boundary, rarely.
        assert (ours != reference).mean() < 0.01
        np.testing.assert_allclose(ours, reference, rtol=2.0**-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [4096, 3584, 128])
def test_kernels_lower_for_a_gpu(width: int, dtype: jnp.dtype) -> None:
    def both(x: jax.Array, residual: jax.Array, scale: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, inverse_rms, total = rms_norm_forward(x, scale, residual=residual, tail=64)
        return y, rms_norm_backward(total, scale, inverse_rms, dy, extra=x, d_total=x)

    shape = jax.ShapeDtypeStruct
    rows, wider = shape((37, width), dtype), shape((37, width + 64), dtype)
    text = lower_for_cuda(both, rows, rows, shape((width,), dtype), wider)
    assert text.count("stablehlo.custom_call") == 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must agree"):
        rms_norm(normal(2, 4), normal(5))
    with pytest.raises(ValueError, match="one shape"):
        add_rms_norm(normal(2, 4), normal(3, 4), normal(4))
    with interpreted(), pytest.raises(NotImplementedError, match="too wide"):
        rms_norm(normal(1, 40000), normal(40000), implementation="triton")
    assert rms_norm(normal(0, 4), normal(4)).shape == (0, 4)
