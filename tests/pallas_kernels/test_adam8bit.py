"""The 8-bit AdamW op against float64 NumPy: its maps, its search, its update, and where blocks end."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.adam8bit import Moments8bit, adam8bit, adam8bit_init, dequantize_blockwise, quantize_blockwise
from pallas_kernels.adam8bit import reference as reference_module
from pallas_kernels.adam8bit import triton as triton_module
from pallas_kernels.adam8bit import xla as xla_module
from pallas_kernels.adam8bit.reference import adam8bit_reference, dynamic_map, midpoints

F32 = np.finfo(np.float32)
HYPER = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
STATIC = ("b1", "b2", "eps", "weight_decay", "block_size", "apply", "implementation")
UPDATE = jax.jit(adam8bit, static_argnames=STATIC)


def gradients(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 over several decades with a zero here and there: what makes every part of the maps be used."""
    magnitude = 10.0 ** rng.uniform(-5, 0, shape)
    return (rng.standard_normal(shape) * magnitude * (rng.random(shape) > 0.05)).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_dynamic(signed: bool) -> None:
    entries = dynamic_map(signed)
    assert entries.shape == (256,)
    assert entries.dtype == np.float32
    assert (np.diff(entries) > 0).all()
    parts = [2 ** (decade + (not signed)) for decade in range(7)]
    centres = [10.0 ** (d - 6) * (0.1 + 0.9 * (np.arange(n) + 0.5) / n) for d, n in enumerate(parts)]
    expected = np.concatenate([*centres, *([-c for c in centres] if signed else []), [0.0, 1.0]])
    np.testing.assert_allclose(entries, np.sort(expected), rtol=4 * F32.eps)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("module", [reference_module, xla_module])
def test_nearest_code_is_exact(module: object, signed: bool) -> None:
    rng = np.random.default_rng(0)
    entries, middle = dynamic_map(signed), midpoints(signed)
    around = [np.nextafter(x, np.float32(side)) for x in (entries, middle) for side in (-2, 2)]
    spread = (10.0 ** rng.uniform(-9, 0, 20_000)).astype(np.float32)
    tiny = np.array([0.0, F32.tiny, F32.smallest_subnormal, 2.0**-23, 1.0], np.float32)
    x = np.concatenate([entries, middle, *around, spread, tiny])
    x = np.clip(np.concatenate([x, -x]), -1 if signed else 0, 1)
    distance = np.abs(x.astype(np.float64)[:, None] - entries.astype(np.float64))
    codes = np.asarray(jax.jit(module.nearest_code, static_argnums=1)(x, signed))  # type: ignore[attr-defined]
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, distance.argmin(axis=1))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("p", [1, 255, 256, 700])
def test_quantize_blockwise(signed: bool, p: int) -> None:
    rng = np.random.default_rng(p)
    x = gradients(rng, (3, p)) * np.float32([[1e-20], [1.0], [1e20]])
    x = x if signed else np.abs(x)
    codes, absmax = quantize_blockwise(jnp.asarray(x), signed=signed)
    assert codes.shape == x.shape
    assert absmax.shape == (3, -(-p // 256))
    back = np.asarray(dequantize_blockwise(codes, absmax, signed=signed))
    for start in range(0, p, 256):
        block = x[:, start : start + 256].astype(np.float64)
        largest = np.abs(block).max(axis=1)
        np.testing.assert_array_equal(np.asarray(absmax)[:, start // 256], largest)
        best = np.abs(block[..., None] - largest[:, None, None] * dynamic_map(signed)).min(axis=-1)
        error = np.abs(back[:, start : start + 256] - block)
        # Dividing, multiplying: half a unit in the last place each, relative to at most the block's maximum.
        assert (error <= best + 2 * F32.eps * largest[:, None]).all()


def test_degenerate_blocks() -> None:
    x = np.zeros((4, 300), np.float32)
    x[1] = F32.smallest_subnormal
    x[2, 7], x[3, 7] = np.nan, np.inf
    for signed in (True, False):
        codes, absmax = quantize_blockwise(jnp.asarray(x), signed=signed)
        assert (np.asarray(codes)[:2] == np.flatnonzero(dynamic_map(signed) == 0)[0]).all()
        back = np.asarray(dequantize_blockwise(codes, absmax, signed=signed))
        assert (np.abs(back[:2]) < F32.tiny).all()
        assert not np.isfinite(back[2:, :256]).any(), "a gradient that is not finite must be seen"
        assert (back[2:, 256:] == 0).all(), "but only in its own block"


def expected_update(
    grad: np.ndarray, moments: Moments8bit, param: np.ndarray, step: int, rate: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The update and both new moments in float64, from the moments that the codes stand for."""
    values = []
    for codes, absmax, signed in ((moments[0], moments[1], True), (moments[2], moments[3], False)):
        scales = np.repeat(np.asarray(absmax, np.float64), 256, axis=-1)[..., : codes.shape[-1]]
        values.append(dynamic_map(signed).astype(np.float64)[np.asarray(codes)] * scales)
    g = grad.astype(np.float64).reshape(values[0].shape)
    m = HYPER["b1"] * values[0] + (1 - HYPER["b1"]) * g
    v = HYPER["b2"] * values[1] + (1 - HYPER["b2"]) * g * g
    m_hat, v_hat = m / (1 - HYPER["b1"] ** step), v / (1 - HYPER["b2"] ** step)
    direction = (m_hat / (np.sqrt(v_hat) + HYPER["eps"])).reshape(param.shape)
    return -rate * (direction + HYPER["weight_decay"] * param.astype(np.float64)), m, v


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 61), (2, 16, 48), (1, 1, 1)])
def test_update_is_adamw_in_float32(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(1)
    param = jnp.asarray(rng.standard_normal(shape), dtype)
    moments = adam8bit_init(shape, stack_axes=1)
    for step in range(1, 51):
        grad = jnp.asarray(gradients(rng, shape), dtype)
        rate = 1e-2 / step
        expected, m, v = expected_update(np.asarray(grad), moments, np.asarray(param), step, rate)
        update, moments = UPDATE(grad, moments, param, step=jnp.int32(step), learning_rate=jnp.float32(rate), **HYPER)
        assert update.dtype == jnp.float32
        # About ten float32 roundings; the moment may be a difference, so that its error counts against its parts.
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5 * rate)
        for codes, absmax, exact, signed in ((*moments[:2], m, True), (*moments[2:], v, False)):
            back = np.asarray(dequantize_blockwise(codes, absmax, signed=signed))
            scales = np.repeat(np.asarray(absmax, np.float64), 256, axis=-1)[..., : back.shape[-1]]
            np.testing.assert_array_less(np.abs(exact), scales * (1 + 1e-6) + F32.tiny)
            best = np.abs(exact[..., None] - scales[..., None] * dynamic_map(signed)).min(axis=-1)
            assert (np.abs(back - exact) <= best + 4 * F32.eps * scales).all()
        param = (param + update).astype(dtype)


def test_implementations_agree() -> None:
    rng = np.random.default_rng(2)
    shape = (2, 3, 500)
    param, moments = jnp.asarray(gradients(rng, shape)), adam8bit_init(shape, stack_axes=1)
    reference = jax.jit(partial(adam8bit_reference, block_size=256, **HYPER))
    for step in range(1, 6):
        grad = jnp.asarray(gradients(rng, shape))
        expected, _ = reference(grad, moments, param, jnp.int32(step), 1e-3)
        update, moments = UPDATE(grad, moments, param, step=jnp.int32(step), learning_rate=1e-3, **HYPER)
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 3, 100), (4, 16, 64), (2, 4, 7, 50)])
def test_stack_equals_single_tensors_bit_for_bit(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    stack_axes = len(shape) - 2
    stack = shape[:stack_axes]
    param = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    whole = adam8bit_init(shape, stack_axes=stack_axes)
    parts = {index: adam8bit_init(shape[stack_axes:]) for index in np.ndindex(stack)}
    for step in range(1, 4):
        grad = jnp.asarray(gradients(rng, shape) * 10.0 ** rng.uniform(-3, 3, (*stack, 1, 1)), jnp.float32)
        common = {"step": jnp.int32(step), "learning_rate": jnp.float32(1e-3), **HYPER}
        update, whole = UPDATE(grad, whole, param, **common)
        for index in parts:
            single, parts[index] = UPDATE(grad[index], parts[index], param[index], **common)
            for ours, theirs in zip((update, *whole), (single, *parts[index])):
                np.testing.assert_array_equal(ours[index], theirs)


def test_state_is_small_and_can_be_donated() -> None:
    shape = (2, 64, 512)
    size = int(np.prod(shape))

    def apply(
        param: jax.Array, moments: Moments8bit, grad: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Moments8bit]:
        update, moments = adam8bit(grad, moments, param, step=step, learning_rate=1e-3, **HYPER)
        return param + update, moments

    moments, param, grad = adam8bit_init(shape, stack_axes=1), jnp.zeros(shape), jnp.ones(shape)
    assert sum(x.nbytes for x in moments) == size * (2 + 2 * 4 / 256)
    jitted = jax.jit(apply, donate_argnums=(0, 1))
    memory = jitted.lower(param, moments, grad, jnp.int32(1)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in (param, *moments))
    # Both moments and their quotients by the scale in float32 at the worst: a table of distances would be 1 KiB each.
    assert memory.temp_size_in_bytes < 17 * size
    for step in range(1, 4):
        old = (param, *moments)
        param, moments = jitted(param, moments, grad, jnp.int32(step))
        assert all(x.is_deleted() for x in old)
    assert jitted._cache_size() == 1


def test_arguments_are_checked() -> None:
    moments, grad = adam8bit_init((2, 600), stack_axes=1), jnp.ones((2, 600))
    common = {"step": jnp.int32(1), "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="do not fit together"):
        adam8bit(grad[:, :599], moments, grad, **common)
    with pytest.raises(ValueError, match="blocks of 128"):
        adam8bit(grad, moments, grad, block_size=128, **common)
    with pytest.raises(ValueError, match="do not fit together"):
        adam8bit(grad[0], adam8bit_init((2, 600)), grad[0], **common)
    with pytest.raises(ValueError, match="implementation"):
        adam8bit(grad, moments, grad, implementation="cuda", **common)


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_code_in_the_kernel_is_exact(signed: bool) -> None:
    rng = np.random.default_rng(0)
    middle = midpoints(signed)
    around = [np.nextafter(x, np.float32(side)) for x in (dynamic_map(signed), middle) for side in (-2, 2)]
    x = np.concatenate([dynamic_map(signed), middle, *around, 10.0 ** rng.uniform(-9, 0, 5000)]).astype(np.float32)
    x = np.clip(np.concatenate([x, -x]), -1 if signed else 0, 1)
    x = np.pad(x, (0, -x.size % 4096))

    def kernel(x_ref: Any, midpoints_ref: Any, codes_ref: Any) -> None:
        codes_ref[...] = triton_module.nearest_code(x_ref[...], signed, midpoints_ref)

    out = jax.ShapeDtypeStruct(x.shape, jnp.uint8)
    codes = pl.pallas_call(kernel, out_shape=out, interpret=True)(jnp.asarray(x), jnp.asarray(middle))
    np.testing.assert_array_equal(codes, reference_module.nearest_code(jnp.asarray(x), signed))


@pytest.mark.parametrize(("shape", "stack_axes"), [((3, 5, 61), 1), ((2, 16, 160), 1), ((1,), 0), ((2, 2, 2100), 2)])
def test_kernel_equals_the_reference(shape: tuple[int, ...], stack_axes: int) -> None:
    rng = np.random.default_rng(4)
    param = jnp.asarray(gradients(rng, shape))
    ours = theirs = adam8bit_init(shape, stack_axes=stack_axes)
    with interpreted():
        run = jax.jit(partial(adam8bit, implementation="triton", **HYPER))
        for step in range(1, 5):
            grad = jnp.asarray(gradients(rng, shape))
            common = {"step": jnp.int32(step), "learning_rate": jnp.float32(1e-3)}
            update, ours = run(grad, theirs, param, **common)
            expected, theirs = UPDATE(grad, theirs, param, implementation="xla", **common, **HYPER)
            np.testing.assert_allclose(update, expected, rtol=2e-6, atol=1e-9)
            for codes, absmax, reference_codes, reference_absmax in zip(
                ours[::2], ours[1::2], theirs[::2], theirs[1::2]
            ):
                np.testing.assert_allclose(absmax, reference_absmax, rtol=2e-7)
                # A value within rounding of two codes' midpoint may take the other one.
                difference = np.abs(np.asarray(codes, int) - np.asarray(reference_codes, int))
                assert difference.max() <= 1
                assert difference.mean() < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_applied_update(implementation: str, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(5)
    param, grad = (jnp.asarray(gradients(rng, (2, 300)), dtype) for _ in range(2))
    moments = adam8bit_init((2, 300), stack_axes=1)
    common = {"step": jnp.int32(1), "learning_rate": jnp.float32(1e-2), **HYPER}
    with interpreted():
        update, _ = adam8bit(grad, moments, param, implementation=implementation, **common)
        applied, _ = adam8bit(grad, moments, param, implementation=implementation, apply=True, **common)
    assert applied.dtype == dtype
    exact = np.asarray(param, np.float64) + np.asarray(update, np.float64)
    np.testing.assert_allclose(np.asarray(applied, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-8)


def test_kernel_shows_gradients_that_are_not_finite_in_their_block_only() -> None:
    grad = np.ones((1, 600), np.float32)
    grad[0, 3], grad[0, 300] = np.nan, np.inf
    with interpreted():
        update, moments = adam8bit(
            jnp.asarray(grad),
            adam8bit_init((1, 600), stack_axes=1),
            jnp.zeros((1, 600)),
            step=jnp.int32(1),
            learning_rate=1e-3,
            implementation="triton",
        )
    finite = np.isfinite(dequantize_blockwise(*moments[:2], signed=True))
    assert not finite[0, :512].any()
    assert finite[0, 512:].all()
    assert not np.isfinite(update[0, [3, 300]]).any()


@pytest.mark.parametrize(("p", "dtype"), [(1 << 20, jnp.float32), (70000, jnp.bfloat16)])
def test_kernel_lowers_for_a_gpu_and_works_in_place(p: int, dtype: jnp.dtype) -> None:
    shapes = jax.eval_shape(lambda: (adam8bit_init((2, p), stack_axes=1), jnp.zeros((2, p), dtype), jnp.int32(1)))

    def apply(moments: Moments8bit, param: jax.Array, step: jax.Array) -> tuple[jax.Array, Moments8bit]:
        return adam8bit(param * 2, moments, param, step=step, learning_rate=1e-3, apply=True)

    text = lower_for_cuda(apply, *shapes)
    assert (text.count("stablehlo.custom_call"), text.count("#stablehlo.output_operand_alias<")) == (1, 5)
