"""What only a GPU can show: its bytes are the host's where the format says so, and attention is the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.lora_linear import lora_linear
from pallas_kernels.nf4 import dequantize, quantize

pytestmark = pytest.mark.gpu


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(512, 1024), (37, 70)])
def test_nf4_codes_and_values_are_the_hosts(shape: tuple[int, int], dtype: str) -> None:
    host = weight(shape).astype(jnp.dtype(dtype))
    on_host, on_device = quantize(host), quantize(jnp.asarray(host))
    np.testing.assert_array_equal(on_device.codes, on_host.codes)
    np.testing.assert_allclose(on_device.nested_absmax, on_host.nested_absmax, rtol=1e-6)
    for target in ("bfloat16", "float16", "float32"):
        expected = dequantize(on_host, jnp.dtype(target))
        actual = dequantize(jax.device_put(on_host), jnp.dtype(target))
        np.testing.assert_array_equal(np.asarray(actual).view(np.uint8), np.asarray(expected).view(np.uint8))


def test_adapted_linear_in_bfloat16_is_within_its_rounding() -> None:
    rng = np.random.default_rng(1)
    m, n, k, r = 1000, 768, 1024, 64
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((m, k), (m, n)))
    packed = quantize(jnp.asarray(weight((n, k)), jnp.bfloat16))
    a, b = (jnp.asarray(rng.normal(size=shape) * 0.03, jnp.float32) for shape in ((r, k), (n, r)))
    y, pullback = jax.vjp(jax.jit(lambda x, a, b: lora_linear(x, packed, None, a, b, scaling=2.0)), x, a, b)
    dx, da, db = pullback(dy)
    x64, dy64, w64, a64, b64 = (np.asarray(v, np.float64) for v in (x, dy, dequantize(packed), a, b))
    expected = {
        "y": x64 @ w64.T + 2 * (x64 @ a64.T) @ b64.T,
        "dx": dy64 @ w64 + 2 * (dy64 @ b64) @ a64,
        "da": 2 * (dy64 @ b64).T @ x64,
        "db": 2 * dy64.T @ (x64 @ a64.T),
    }
    for name, actual in {"y": y, "dx": dx, "da": da, "db": db}.items():
        error = np.linalg.norm(np.asarray(actual, np.float64) - expected[name]) / np.linalg.norm(expected[name])
        # Two roundings to bfloat16 (2^-9 each at most), which partly average out.
        assert error < 2 * 2.0**-9, (name, error)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(8, 8, 128), (8, 2, 64)])
def test_attention_equals_the_sliced_one(heads: tuple[int, int, int], packed: bool, window: int | None) -> None:
    n, kv_heads, h = heads
    rng = np.random.default_rng(2)
    shapes = ((2, 1000, n, h), (2, 1000, kv_heads, h), (2, 1000, kv_heads, h))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    dy = jnp.asarray(rng.normal(size=shapes[0]), jnp.bfloat16)
    # Ragged documents, then padding.
    segments = jnp.asarray(np.searchsorted([170, 171, 600, 990], np.arange(1000), side="right") + 1, jnp.int32) % 5
    segment_ids = jnp.stack([segments, segments[::-1]]) if packed else None

    def run(implementation: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(
            lambda *x: attention(*x, segment_ids=segment_ids, window=window, implementation=implementation), *arrays
        )
        return out, *pullback(dy.astype(out.dtype))

    # A GPU multiplies float32 matrices in TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        truth = run("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    errors = {}
    for implementation in ("cudnn", "triton", "xla"):
        results = run(implementation, q, k, v)
        errors[implementation] = [
            float(jnp.linalg.norm(r.astype(jnp.float32) - t) / jnp.linalg.norm(t)) for r, t in zip(results, truth)
        ]
    for implementation in ("cudnn", "triton"):
        for error, sliced in zip(errors[implementation], errors["xla"]):
            assert error < 1.5 * sliced, errors
        for first, second in zip(run(implementation, q, k, v), run(implementation, q, k, v)):
            np.testing.assert_array_equal(np.asarray(first).view(np.uint16), np.asarray(second).view(np.uint16))
