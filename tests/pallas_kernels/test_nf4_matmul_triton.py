"""Products with a packed weight through Triton's interpreter, against float64, at every way they are computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import assume_capability, lower_for_cuda
from pallas_kernels._dispatch import record_choices
from pallas_kernels._triton import interpreted
from pallas_kernels.nf4 import NF4Layer, dequantize, quantize
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.reference import nf4_matmul_reference
from pallas_kernels.nf4_matmul.triton import FUSED_ROWS, can_fuse, fused_product, fused_row

# (rows of x, out, in, block, double quantisation): one row, few, more than are fused; sizes that no tile divides.
CASES = [(1, 37, 192, 64, True), (1, 24, 1024, 64, False), (5, 70, 192, 64, True), (16, 64, 256, 128, True)]
CASES += [
    (1, 5, 17 * 64, 64, True),
    (33, 130, 64, 64, True),
    (FUSED_ROWS, 24, 128, 32, False),
    (FUSED_ROWS + 1, 70, 192, 64, True),
]


def draw(m: int, n: int, k: int, dtype: str, **kwargs: object) -> tuple[jax.Array, jax.Array, object]:
    rng = np.random.default_rng(m + n + k)
    w = rng.standard_normal((n, k), np.float32) / np.float32(k**0.5)
    x, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((m, k), (m, n)))
    return x, dy, quantize(jnp.asarray(w, dtype), **kwargs)


def value_and_dx(x: jax.Array, w: object, dy: jax.Array, implementation: str) -> tuple[np.ndarray, ...]:
    y, pull = jax.vjp(lambda x: nf4_matmul(x, w, implementation), x)
    return tuple(np.asarray(v, np.float64) for v in (y, pull(dy)[0]))


@pytest.mark.parametrize(
    ("m", "n", "k", "block", "double_quant", "dtype"),
    [(*case, "bfloat16") for case in CASES] + [(*CASES[0], "float32"), (*CASES[2], "float16"), (*CASES[2], "float32")],
)
def test_as_good_as_the_reference(m: int, n: int, k: int, block: int, double_quant: bool, dtype: str) -> None:
    x, dy, w = draw(m, n, k, dtype, block_size=block, double_quant=double_quant)
    # Neither the reference's rounding of the weight nor the kernels' of the table and the scales is part of the truth.
    weight = np.asarray(dequantize(dataclasses.replace(w, dtype="float32")), np.float64)
    truth = np.asarray(x, np.float64) @ weight.T, np.asarray(dy, np.float64) @ weight
    with interpreted():
        got = value_and_dx(x, w, dy, "triton")
    reference = np.asarray(nf4_matmul_reference(x, w), np.float64), value_and_dx(x, w, dy, "xla")[1]
    for ours, theirs, true in zip(got, reference, truth, strict=True):
        # float32 sums of up to 192 products of about unit size in all, in any order
        limit = 1.5 * np.linalg.norm(theirs - true) + 1e-6 * np.linalg.norm(true)
        assert np.linalg.norm(ours - true) <= limit


@pytest.mark.parametrize("m", [1, 7])
def test_one_layer_of_a_stack(m: int) -> None:
    rng = np.random.default_rng(5)
    stack = quantize(jnp.asarray(rng.standard_normal((3, 40, 128)), jnp.bfloat16))
    x = jnp.asarray(rng.standard_normal((m, 128)), jnp.bfloat16)
    with interpreted():
        y = fused_product(x, NF4Layer(stack, jnp.int32(2)))
        alone = fused_product(x, jax.tree.map(lambda leaf: leaf[2], stack))
    np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize("m", [1, 16, FUSED_ROWS, 256])
@pytest.mark.parametrize("shape", [(14336, 4096), (1536, 576), (1025, 1024)])
def test_lowers_to_cuda(shape: tuple[int, int], m: int) -> None:
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    x = jax.ShapeDtypeStruct((m, shape[1]), jnp.bfloat16)
    text = lower_for_cuda(lambda x, w: nf4_matmul(x, w, "triton"), x, w)
    assert ("nf4_decode" in text) == (m > FUSED_ROWS)


def test_float32_rows_are_not_multiplied_on_tensor_cores() -> None:
    w = quantize(jnp.ones((8, 128)))
    assert can_fuse(jnp.ones((1, 128)), w)
    assert not can_fuse(jnp.ones((2, 128)), w)
    assert not can_fuse(jnp.ones((2, 128), jnp.bfloat16), w)
    assert can_fuse(jnp.ones((2, 128), jnp.bfloat16), quantize(jnp.ones((16, 128))))


def test_one_row_of_float32_has_weights_rounded_to_their_own_dtype() -> None:
    rng = np.random.default_rng(9)
    w = quantize(jnp.asarray(rng.standard_normal((12, 128)), jnp.bfloat16))
    x = jnp.asarray(rng.standard_normal((1, 128)), jnp.float32)
    with interpreted():
        y = nf4_matmul(x, w, "triton")
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_allclose(y, expected, rtol=0, atol=129 * 2.0**-24 * 4 * 128)


@pytest.mark.parametrize(
    ("m", "n", "k", "chosen"),
    [
        (1, 4096, 14336, "mosaic"),
        (9, 4096, 14336, "mosaic"),
        (9, 14336, 4096, "mosaic"),
        (65, 4096, 14336, "triton"),
        (65, 14336, 4096, "mosaic"),
        (512, 14336, 4096, "mosaic"),
    ]
    + [(513, 14336, 4096, "triton"), (256, 4096, 4096, "triton"), (256, 8200, 4096, "triton"), (8192, 40, 96, "xla")],
)
def test_what_is_chosen_on_a_hopper_gpu(m: int, n: int, k: int, chosen: str) -> None:
    if chosen == "mosaic" and jax.__version_info__ < (0, 11):
        chosen = "triton"
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((n, k), jnp.bfloat16))
    with assume_capability(9.0), record_choices(trace_as="xla") as choices:
        jax.eval_shape(nf4_matmul, jax.ShapeDtypeStruct((m, k), jnp.bfloat16), w)
    assert choices[0].implementation == chosen


# Rows of the members and ranks of what is added to them (None: nothing): sizes that no tile divides.
GROUPS = [([40, 13, 24], [4, None, 3]), ([16, 16], [None, None]), ([9], [16])]


@pytest.mark.parametrize(("sizes", "ranks"), GROUPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_row_of_several_weights(sizes: list[int], ranks: list[int | None], dtype: str) -> None:
    rng = np.random.default_rng(11)
    k = 192
    x = jnp.asarray(rng.standard_normal((1, k)), dtype)
    stacks = [
        quantize(jnp.asarray(rng.standard_normal((2, n, k)) / k**0.5, dtype), double_quant=i != 1)
        for i, n in enumerate(sizes)
    ]
    ups = [
        None if r is None else jnp.asarray(rng.standard_normal((n, r)), dtype)
        for n, r in zip(sizes, ranks, strict=True)
    ]
    low = jnp.asarray(rng.standard_normal((1, sum(r or 0 for r in ranks))), dtype)
    layers = [NF4Layer(stack, jnp.int32(1)) for stack in stacks]
    with interpreted():
        y = fused_row(x, layers, ups, low)
        alone = jnp.concatenate([fused_product(x, layer) for layer in layers], axis=1)
    expected, column = [], 0
    for stack, up in zip(stacks, ups, strict=True):
        weight = dequantize(dataclasses.replace(jax.tree.map(lambda leaf: leaf[1], stack), dtype="float32"))
        value = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        if up is not None:
            some = np.asarray(low[:, column : column + up.shape[1]], np.float64)
            value, column = value + some @ np.asarray(up, np.float64).T, column + up.shape[1]
        expected.append(value)
    truth = np.concatenate(expected, axis=1)
    # The table in 16 bits, and the result's rounding; in float32 that of the sums.
    limit = {"bfloat16": 2.0**-8, "float32": 1e-6}[dtype]
    assert np.linalg.norm(np.asarray(y, np.float64) - truth) <= limit * np.linalg.norm(truth)
    if not any(ranks):
        np.testing.assert_array_equal(y, alone)


def test_several_weights_lower_to_cuda_as_one_kernel() -> None:
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096)]
    stacks = [jax.eval_shape(quantize, jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)) for shape in shapes]
    ups = [jax.ShapeDtypeStruct((n, 16), jnp.bfloat16) for n, _ in shapes]
    x, low = (jax.ShapeDtypeStruct((1, width), jnp.bfloat16) for width in (4096, 48))

    def product(x: jax.Array, low: jax.Array, index: jax.Array, stacks: Any, ups: Any) -> jax.Array:
        return fused_row(x, [NF4Layer(stack, index) for stack in stacks], ups, low)

    text = lower_for_cuda(product, x, low, jax.ShapeDtypeStruct((), jnp.int32), stacks, ups)
    assert text.count("@__gpu$xla.gpu.triton(") == 1
