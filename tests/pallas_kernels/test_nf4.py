from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.nf4 import DYNAMIC_MAP, NF4_TABLE, NF4Tensor, dequantize, quantize
from pallas_kernels.nf4.reference import decode_scales, nf4_dequantize_reference
from pallas_kernels.nf4.specs import WEIGHTS

DTYPES = ("bfloat16", "float16", "float32")
# Rows that are whole blocks; rows that blocks cross; an odd row; an odd count; less than one block; one element; more
# than a slab of the host's loop with an odd end.
SHAPES = [(4, 128), (7, 96), (6, 33), (5, 77), (3, 9), (1, 1), (3, 70001)]


def draw(shape, dtype="float32", seed=0, scale=0.02):
    w = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)
    return w.astype(dtype)


def assert_same(a, b):
    """Equal to the bit, in dtype and shape too."""
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def unpacked(t: NF4Tensor) -> np.ndarray:
    """The 4-bit code of each element, one byte each, by the format's text: high nibble first."""
    codes = []
    for byte in np.asarray(t.codes).reshape(-1).tolist():
        codes += [byte >> 4, byte & 15]
    return np.array(codes)


def decoded_by_hand(t: NF4Tensor) -> np.ndarray:
    """One weight in float64, by the format's text, without any rounding to narrower dtypes."""
    absmax = t.absmax.astype(np.float64)
    if t.is_nested:
        group = np.arange(absmax.size) // t.nested_block_size
        absmax = DYNAMIC_MAP.astype(np.float64)[t.absmax] * t.nested_absmax[group] + np.float64(t.nested_offset)
    elements = np.arange(t.shape[0] * t.shape[1])
    return (NF4_TABLE.astype(np.float64)[unpacked(t)[elements]] * absmax[elements // t.block_size]).reshape(t.shape)


def test_tables_are_sorted_with_exact_zero_and_ends():
    assert NF4_TABLE.shape == (16,)
    assert DYNAMIC_MAP.shape == (256,)
    for table, least in ((NF4_TABLE, -1.0), (DYNAMIC_MAP, -0.99297)):
        assert (np.diff(table) > 0).all()
        assert 0.0 in table
        assert table[-1] == 1.0
        assert table[0] == pytest.approx(least, abs=1e-5)
    # Seven decades of 1, 2, .. 64 cells a sign, a zero and a one.
    magnitudes = np.abs(DYNAMIC_MAP[(DYNAMIC_MAP != 0) & (DYNAMIC_MAP != 1)])
    decades = np.ceil(np.log10(magnitudes)).astype(int)
    assert [(decades == e).sum() for e in range(-6, 1)] == [2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest_entries_of_the_scaled_table(shape, block_size):
    w = draw(shape)
    t = quantize(w, double_quant=False, block_size=block_size)
    flat = w.reshape(-1).astype(np.float64)
    blocks = -(-flat.size // block_size)
    padded = np.concatenate([flat, np.zeros(blocks * block_size - flat.size)]).reshape(blocks, block_size)
    absmax = np.abs(padded).max(axis=1)
    np.testing.assert_array_equal(t.absmax, absmax)
    assert t.codes.shape == (-(-flat.size // 2),)

    scaled = (padded / absmax[:, None]).reshape(-1)[: flat.size]
    distance = np.abs(scaled[:, None] - NF4_TABLE.astype(np.float64))
    chosen = np.take_along_axis(distance, unpacked(t)[: flat.size, None], axis=1)[:, 0]
    # Two roundings of a number of at most 1 may decide between entries that are this near to equally far.
    assert (chosen <= distance.min(axis=1) + 2.0**-22).all()
    if flat.size % 2:
        assert unpacked(t)[-1] == 7


def test_blocks_of_zeros_decode_to_zeros():
    w = draw((3, 100))
    w.reshape(-1)[64:192] = 0
    w.reshape(-1)[256:] = 0
    for array in (w, jnp.asarray(w), np.zeros((2, 33), np.float32), jnp.zeros((2, 33))):
        for double_quant in (False, True):
            t = quantize(array, double_quant=double_quant)
            assert not np.isnan(np.asarray(decode_scales(t))).any()
            assert (np.asarray(dequantize(t))[np.asarray(array) == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_and_jax_agree(shape, dtype):
    w = draw(shape, dtype)
    for double_quant in (False, True):
        on_host, on_device = quantize(w, double_quant=double_quant), quantize(jnp.asarray(w), double_quant=double_quant)
        assert isinstance(on_host.codes, np.ndarray)
        assert isinstance(on_device.codes, jax.Array)
        assert jax.tree.structure(on_host) == jax.tree.structure(on_device)
        assert_same(on_host.codes, on_device.codes)
        # The mean is summed in another order: a unit in the last place moves what is rounded about it.
        np.testing.assert_allclose(decode_scales(on_host), decode_scales(on_device), rtol=1e-6)
        assert_same(dequantize(on_host), dequantize(on_host, implementation="xla"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested_dtype", DTYPES)
def test_decoding_equals_its_definition_to_the_bit(dtype, nested_dtype):
    # Weights of 1e-6 decode into float16's subnormals, where casts and reductions of precision part ways.
    w = np.stack([draw((8, 160), "float32", seed=s, scale=scale) for s, scale in enumerate((0.02, 1e-6, 30.0))])
    stack = dataclasses.replace(quantize(w, dtype=dtype), nested_dtype=nested_dtype)
    for result_dtype in DTYPES:
        fast = dequantize(stack, result_dtype, implementation="xla")
        assert_same(dequantize(stack, result_dtype), fast)
        assert_same(jax.jit(nf4_dequantize_reference, static_argnums=1)(stack, result_dtype), fast)
        for layer in range(3):
            t = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
            scales = DYNAMIC_MAP[t.absmax] * t.nested_absmax
            scales = (scales.astype(nested_dtype) + t.nested_offset.astype(nested_dtype)).astype(np.float32)
            values = NF4_TABLE[unpacked(t)] * scales[np.arange(8 * 160) // 64]
            assert_same(values.astype(dtype).astype(result_dtype).reshape(8, 160), fast[layer])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_decoding_follows_the_text_of_the_format(shape, double_quant):
    t = quantize(draw(shape), double_quant=double_quant)
    by_hand = decoded_by_hand(t)
    # Each of three float32 roundings moves a value by at most 2**-24 of the largest scale.
    np.testing.assert_allclose(dequantize(t), by_hand, rtol=0, atol=3 * 2.0**-24 * np.abs(by_hand).max())


def test_quantisation_error_is_within_half_a_gap():
    w = draw((64, 512))
    t = quantize(w, double_quant=False)
    half_gap = np.diff(NF4_TABLE.astype(np.float64)).max() / 2
    error = np.abs(dequantize(t).astype(np.float64) - w).reshape(-1, 64)
    assert (error <= (half_gap + 2.0**-22) * t.absmax[:, None]).all()


def test_nested_scales_are_the_nearest_of_the_map():
    w = draw((512, 257))
    absmax, t = quantize(w, double_quant=False).absmax, quantize(w)
    assert t.absmax.dtype == np.uint8
    assert t.nested_absmax.shape == (-(-absmax.size // 256),)
    assert t.nested_offset == pytest.approx(absmax.mean(dtype=np.float64), rel=1e-6)
    shifted = absmax - t.nested_offset
    group = np.arange(absmax.size) // 256
    np.testing.assert_array_equal(t.nested_absmax, np.maximum.reduceat(np.abs(shifted), np.arange(0, absmax.size, 256)))
    scaled = shifted.astype(np.float64) / t.nested_absmax[group]
    distance = np.abs(scaled[:, None] - DYNAMIC_MAP.astype(np.float64))
    chosen = np.take_along_axis(distance, t.absmax[:, None].astype(int), axis=1)[:, 0]
    assert (chosen <= distance.min(axis=1) + 2.0**-23).all()


def test_a_stack_is_its_weights_one_by_one():
    w = draw((2, 3, 10, 30))
    for convert in (np.asarray, jnp.asarray):
        stack = quantize(convert(w))
        assert stack.stack_shape == (2, 3)
        assert stack.shape == (10, 30)
        decoded = dequantize(stack)
        for index in np.ndindex(2, 3):
            one = quantize(convert(w[index]))
            for leaf, layer in zip(jax.tree.leaves(one), jax.tree.leaves(stack), strict=True):
                assert_same(leaf, np.asarray(layer)[index])
            assert_same(dequantize(one), decoded[index])


def test_jit_scan_and_abstract_evaluation():
    w = draw((3, 16, 64), "bfloat16")
    stack = quantize(w)

    def body(carry, t):
        return carry, dequantize(t)

    _, scanned = jax.jit(lambda t: jax.lax.scan(body, 0, t))(stack)
    assert_same(scanned, dequantize(stack))
    traced = jax.jit(quantize, static_argnames=("dtype", "double_quant", "block_size"))(w)
    assert_same(traced.codes, stack.codes)
    abstract = jax.eval_shape(quantize, jax.ShapeDtypeStruct(w.shape, w.dtype))
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, stack)
    assert jax.eval_shape(dequantize, abstract).shape == w.shape


def test_xla_decoding_holds_the_weight_once():
    t = jax.tree.map(jnp.asarray, quantize(draw((256, 512), "bfloat16")))
    memory = jax.jit(dequantize).lower(t).compile().memory_analysis()
    assert memory.output_size_in_bytes == 256 * 512 * 2
    # The decoded scales, one float32 a block, may be held beside it.
    assert memory.temp_size_in_bytes <= t.absmax.size * 4 + 1024


def test_host_temporaries_stay_small():
    w = draw((1024, 4096), "bfloat16")
    tracemalloc.start()
    t = quantize(w)
    peak_of_quantize = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    decoded = dequantize(t)
    peak_of_dequantize = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_of_quantize < t.nbytes + 8 * 2**20
    assert peak_of_dequantize < held + decoded.nbytes + 8 * 2**20


def test_numpy_needs_no_device():
    script = (
        "import numpy as np, pallas_kernels as pk\n"
        "w = np.random.default_rng(0).standard_normal((4, 96), np.float32)\n"
        "assert isinstance(pk.nf4_dequantize(pk.nf4_quantize(w)), np.ndarray)\n"
    )
    # Starting a device would fail: there is no such platform.
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "JAX_PLATFORMS": "none_such"})


def test_logical_dtype():
    w = draw((2, 64))
    t = quantize(w, dtype=jnp.bfloat16)
    assert t.dtype == "bfloat16"
    assert dequantize(t).dtype == jnp.bfloat16
    assert_same(dequantize(t, "float32"), dequantize(t).astype(np.float32))


def test_errors_name_value_rule_and_remedy():
    w = draw((4, 64))
    for bad in (np.inf, np.nan):
        broken = w.copy()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(broken)
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        quantize(w[0])
    with pytest.raises(ValueError, match=r"shape \(0, 64\)"):
        quantize(w[:0])
    with pytest.raises(ValueError, match="block_size is 48; use one of"):
        quantize(w, block_size=48)
    with pytest.raises(ValueError, match="float64 is not supported; use one of bfloat16"):
        quantize(w.astype(np.float64))
    with pytest.raises(ValueError, match="int8 is not supported"):
        dequantize(quantize(w), "int8")
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        dequantize(quantize(w), implementation="cuda")


def test_public_names():
    assert pallas_kernels.nf4_quantize is quantize
    assert pallas_kernels.nf4_dequantize is dequantize
    assert pallas_kernels.NF4Tensor is NF4Tensor
    assert "nf4_quantize" in dir(pallas_kernels)
    with pytest.raises(AttributeError, match="nf5"):
        _ = pallas_kernels.nf5


def test_named_shapes_are_whole_blocks():
    assert WEIGHTS[(14336, 4096)] == "llama-3-8b/gate_proj"
    assert all(columns % 64 == 0 for _, columns in WEIGHTS)


def test_a_weight_that_a_compiled_function_closes_over() -> None:
    """XLA of jax 0.10 cast constants from bytes to codes wrongly."""
    t = quantize(jax.random.normal(jax.random.key(0), (16, 128)))
    np.testing.assert_array_equal(jax.jit(lambda: dequantize(t, jnp.float32))(), dequantize(t, jnp.float32))
