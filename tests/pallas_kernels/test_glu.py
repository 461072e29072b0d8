"""Gated units against float64 truth, in every implementation, and what their kernels become on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.glu import glu, glu_backward, glu_forward

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
IMPLEMENTATIONS = ("xla", "triton")


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def normal(*shape: int, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def activation_and_slope(x: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """By their definitions, in float64."""
    if activation == "silu":
        s = 0.5 * (1 + np.tanh(x / 2))
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu":
        cumulative = 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))
        return x * cumulative, cumulative + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)


def truth(dh: jax.Array, gate: jax.Array, up: jax.Array, activation: str) -> list[np.ndarray]:
    """The unit and the gradients of gate and up."""
    d, g, u = (np.asarray(x, np.float64) for x in (dh, gate, up))
    value, slope = activation_and_slope(g, activation)
    return [value * u, d * u * slope, d * value]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation: str, implementation: str) -> None:
    gate, up, dh = 4 * normal(2, 3, 533), normal(2, 3, 533, seed=1), normal(2, 3, 533, seed=2)
    h, pullback = jax.vjp(lambda *x: glu(*x, activation=activation, implementation=implementation), gate, up)
    for actual, expected in zip((h, *pullback(dh)), truth(dh, gate, up, activation)):
        # Float32 sums of parts up to 20, a few roundings each.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("with_h", [False, True])
@pytest.mark.parametrize(("width", "tail"), [(45, 0), (1024, 24), (700, 3)])
def test_halves_of_one_array_and_room_behind(width: int, tail: int, with_h: bool) -> None:
    gate_up, dh = 2 * normal(3, 2 * width), normal(3, width + tail, seed=1)
    h, d_gate, d_up = truth(dh[:, :width], *jnp.split(gate_up, 2, axis=1), "silu")
    for implementation in IMPLEMENTATIONS:
        forward = glu_forward((gate_up,), tail=tail, implementation=implementation)
        np.testing.assert_allclose(forward[:, :width], h, atol=1e-5)
        assert forward.shape == (3, width + tail)
        assert not np.asarray(forward[:, width:]).any()
        # What stands behind the columns in use must not matter, whatever it is.
        poisoned = dh.at[:, width:].set(jnp.nan)
        again, (d_gate_up,) = glu_backward(poisoned, (gate_up,), with_h=with_h, implementation=implementation)
        np.testing.assert_allclose(d_gate_up, np.concatenate([d_gate, d_up], axis=1), atol=1e-5)
        if with_h:
            np.testing.assert_allclose(again[:, :width], h, atol=1e-5)
        else:
            assert again is None


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_no_worse_than_the_reference(dtype: jnp.dtype) -> None:
    gate, up, dh = (normal(4, 600, dtype=dtype, seed=seed) for seed in range(3))
    errors = {}
    for implementation in IMPLEMENTATIONS:
        h, pullback = jax.vjp(lambda *x, i=implementation: glu(*x, implementation=i), gate, up)
        results = (h, *pullback(dh))
        assert {x.dtype for x in results} == {jnp.dtype(dtype)}
        pairs = zip(results, truth(dh, gate, up, "silu"))
        errors[implementation] = [np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e) for a, e in pairs]
    for ours, reference in zip(errors["triton"], errors["xla"]):
        assert ours <= 1.5 * reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_are_finite(activation: str) -> None:
    gate = jnp.asarray([[-1e4, -100, -40, -9.5, -0.0, 0.0, 1e-30, 9.5, 40, 100, 1e4]], jnp.float32)
    dh, up = jnp.ones_like(gate), jnp.ones_like(gate)
    h, d_gate, d_up = truth(dh, gate, up, activation)
    with interpreted():
        actual, gradients = glu_backward(dh, (gate, up), activation=activation, implementation="triton")
    for ours, expected in zip((actual, *gradients), (h, d_gate, d_up)):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [14336, 700])
def test_kernels_lower_for_a_gpu_and_write_over_their_inputs(width: int, dtype: jnp.dtype) -> None:
    gate_up, dh = jax.ShapeDtypeStruct((16, 2 * width), dtype), jax.ShapeDtypeStruct((16, width + 64), dtype)
    for activation in ACTIVATIONS:
        forward = lower_for_cuda(lambda x, a=activation: glu_forward((x,), activation=a, tail=64), gate_up)
        assert forward.count("stablehlo.custom_call") == 1
        backward = lower_for_cuda(lambda d, x, a=activation: glu_backward(d, (x,), activation=a), dh, gate_up)
        assert backward.count("#stablehlo.output_operand_alias<") == 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        glu(normal(2, 4), normal(2, 5))
    with pytest.raises(ValueError, match="'relu' is unknown"):
        glu(normal(2, 4), normal(2, 4), activation="relu")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        glu(normal(2, 4), normal(2, 4), implementation="triton")
    with interpreted(), pytest.raises(NotImplementedError, match="not int32"):
        glu(jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), jnp.int32), implementation="triton")
    assert glu(normal(0, 4), normal(0, 4)).shape == (0, 4)
