"""Products in e4m3 against their definition and against float64, on hostile data; and lowered to CUDA."""

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
from pallas_kernels.fp8_matmul import decode_fp8, fp8_matmul, quantize_rows
from pallas_kernels.fp8_matmul.reference import (
    decode_reference,
    fp8_matmul_reference,
    fp8_transposed_reference,
    quantize_rows_reference,
)
from pallas_kernels.fp8_matmul.triton_rows import finish_triton, quantize_rows_triton
from pallas_kernels.fp8_matmul.xla import finish_xla
from pallas_kernels.glu_linear import glu_linear
from pallas_kernels.lora_linear import Projection, grouped_lora_linear
from pallas_kernels.nf4 import NF4Layer, dequantize, quantize
from pallas_kernels.norm_linear import norm_linear

M, N, K = 23, 96, 192
# Rounding to e4m3 is off by 2**-4 of a value at most, on the average over a binade by its root mean square 2**-4 /
# sqrt(3) / 1.36 = 2.65 %; with two rounded operands by sqrt(2) of that, 3.75 %.
ERROR = 0.0375


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def off(actual: Any, truth: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - truth) / np.linalg.norm(truth))


def weights(n: int = N, k: int = K, **options: Any) -> Any:
    return quantize(jnp.asarray(0.05 * normal(1, n, k)), **options)


def truth_of(w: Any) -> np.ndarray:
    return np.asarray(w if isinstance(w, jax.Array) else dequantize(w, jnp.float32), np.float64)


CASES = {
    "nested": lambda: weights(),
    "float32 scales": lambda: weights(double_quant=False),
    "long blocks": lambda: weights(40, 512, block_size=256),
    "rows that are no whole blocks": lambda: weights(37, 70),
    "dense": lambda: jnp.asarray(normal(2, N, K)),
}


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradient(case: str, implementation: str) -> None:
    w = CASES[case]()
    n, k = w.shape
    x, dy = jnp.asarray(normal(3, M, k)), jnp.asarray(normal(4, M, n))
    with interpreted():
        if implementation == "triton" and case in ("dense", "rows that are no whole blocks"):
            with pytest.raises(NotImplementedError, match=r"dense weight|not whole blocks"):
                fp8_matmul(x, w, implementation=implementation)
            return
        y, pullback = jax.vjp(lambda x: fp8_matmul(x, w, implementation=implementation), x)
        (dx,) = pullback(dy)
    # Sums in another order, and nothing else, away from the definition.
    assert off(y, np.asarray(fp8_matmul_reference(x, w), np.float64)) < 1e-6
    assert off(dx, np.asarray(fp8_transposed_reference(dy, w), np.float64)) < 1e-6
    exact = truth_of(w)
    assert off(y, np.float64(x) @ exact.T) < 1.1 * ERROR
    assert off(dx, np.float64(dy) @ exact) < 1.1 * ERROR


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_side_by_side_of_a_stack(implementation: str, transposed: bool) -> None:
    """To the bit: several weights as one operand, of which one lies in a stack of layers."""
    stack, alone = quantize(jnp.asarray(normal(5, 3, 40, K))), weights()
    layer = NF4Layer(stack, jnp.int32(1))
    with interpreted():
        got = decode_fp8([layer, alone], transposed=transposed, implementation=implementation)
    parts = [decode_reference(w) for w in (layer.picked(), alone)]
    values = np.concatenate([np.asarray(v) for v, _ in parts]).view(np.uint8)
    np.testing.assert_array_equal(np.asarray(got[0]).view(np.uint8), values.T if transposed else values)
    np.testing.assert_array_equal(got[1], np.concatenate([s for _, s in parts]))


def test_outliers_cost_their_own_row_only() -> None:
    """A channel 300 times the others, as attention's sinks and massive activations have: its values are large in every
    row, so what is left of the others is coarser; the error of the product stays that of e4m3, since the outlier's part
    of the product grows as well. A row that is scaled changes nothing at all."""
    x, w = normal(6, M, K), weights()
    x[:, 7] *= 300
    x[3] *= 1e4
    exact = truth_of(w)
    y = np.asarray(fp8_matmul(jnp.asarray(x), w), np.float64)
    truth = np.float64(x) @ exact.T
    errors = np.linalg.norm(y - truth, axis=1) / np.linalg.norm(truth, axis=1)
    assert errors.max() < 2.5 * ERROR
    tame = x.copy()
    tame[3] /= 2.0**13
    np.testing.assert_array_equal(np.asarray(fp8_matmul(jnp.asarray(tame), w)).astype(np.float64)[3] * 2.0**13, y[3])


def test_rows_of_zeros_and_of_what_is_not_finite() -> None:
    x = np.zeros((4, K), np.float32)
    x[1], x[2, 5], x[3, 5] = 1e-41, np.nan, np.inf
    values, scale = quantize_rows(jnp.asarray(x))
    assert np.all(np.asarray(scale)[:2] > 0)
    y = np.asarray(fp8_matmul(jnp.asarray(x), weights()))
    assert not np.any(y[:2])
    assert not np.any(np.asarray(values[0], np.float32))
    assert not np.any(np.isfinite(y[2:]))
    empty = fp8_matmul(jnp.asarray(normal(0, 2, K)), quantize(jnp.zeros((4, K))))
    np.testing.assert_array_equal(empty, 0)


def test_rounding_is_to_the_nearest() -> None:
    """The scale is the row's largest value over 448, and no other e4m3 number is nearer than the one taken."""
    x = normal(7, 5, 64)
    values, scale = quantize_rows(jnp.asarray(x))
    np.testing.assert_allclose(scale, np.abs(x).max(1) / 448, rtol=1e-6)
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    wanted = np.abs(x[..., None] / np.asarray(scale)[:, None, None] - numbers).min(-1)
    taken = np.abs(x / np.asarray(scale)[:, None] - np.asarray(values, np.float32))
    np.testing.assert_allclose(taken, wanted, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "rank"), [(23, 70, 8), (128, 256, 80), (130, 40, 0), (5, 1536, 16)])
def test_kernels_around_the_product(m: int, n: int, rank: int) -> None:
    """Rows rounded as the reference rounds them, and results scaled and added to as XLA does; of any shape."""
    x, column = jnp.asarray(normal(50, m, n)), jnp.asarray(1 + normal(51, n) ** 2)
    low_rank = (jnp.asarray(normal(52, m, rank)), jnp.asarray(normal(53, n, rank))) if rank else None
    with interpreted():
        values, scale = quantize_rows_triton(x, column)
        finished = finish_triton(x, scale, column if rank else None, low_rank)
    wanted, wanted_scale = quantize_rows_reference(x * column)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(wanted).view(np.uint8))
    np.testing.assert_array_equal(scale, wanted_scale)
    plain = finish_xla(x, scale, column if rank else None, low_rank, jnp.float32)
    np.testing.assert_allclose(finished, plain, rtol=1e-5, atol=1e-5)


def test_e5m2_would_be_worse_for_gradients() -> None:
    """Why gradients are e4m3 too: with a scale a row their range suffices, even where columns differ by 10**3."""
    dy = normal(8, M, N) * 10.0 ** np.random.default_rng(9).uniform(-3, 0, N).astype(np.float32)
    truth = np.float64(dy) @ truth_of(weights())
    w8, w_scale = decode_reference(weights())
    scaled = jnp.asarray(dy) * w_scale
    largest = jnp.max(jnp.abs(scaled), axis=1, keepdims=True)
    e5m2 = (scaled / largest * 57344).astype(jnp.float8_e5m2).astype(jnp.float32) * largest / 57344
    values, scale = quantize_rows_reference(scaled)
    e4m3 = values.astype(jnp.float32) * scale[:, None]
    errors = [off(rounded @ w8.astype(jnp.float32), truth) for rounded in (e5m2, e4m3)]
    assert errors[1] < 0.75 * errors[0], errors


def test_bfloat16_is_rounded_twice_more() -> None:
    x, w = jnp.asarray(normal(10, M, K), jnp.bfloat16), weights()
    y = fp8_matmul(x, w)
    assert y.dtype == jnp.bfloat16
    # Two roundings to 8 bits, each off by 2**-9 of a value at most.
    assert off(y, np.asarray(fp8_matmul_reference(x.astype(jnp.float32), w), np.float64)) < 2 * 2.0**-9


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must end in the width"):
        fp8_matmul(jnp.ones((2, K + 1)), weights())
    with pytest.raises(ValueError, match="is a stack"):
        fp8_matmul(jnp.ones((2, K)), quantize(jnp.ones((2, N, K))))
    with pytest.raises(ValueError, match="unknown implementation"):
        fp8_matmul(jnp.ones((2, K)), weights(), implementation="cutlass")


@pytest.mark.parametrize(("capability", "runs"), [(8.0, False), (8.6, False), (8.9, True), (9.0, True)])
def test_kernels_are_refused_where_triton_has_no_e4m3(capability: float, runs: bool) -> None:
    """Of decoding, and of rounding rows: converting would end the process."""
    weight = quantize(jnp.ones((N, K)))
    with assume_capability(capability), record_choices(trace_as="xla") as choices:
        jax.eval_shape(lambda: (decode_fp8([weight]), quantize_rows(jnp.ones((M, K)))))
    assert len(choices) == 2
    for choice in choices:
        assert choice.implementation == ("triton" if runs else "xla")
        assert runs or f"8.9 or newer (Ada), this GPU has {capability}" in dict(choice.refused)["triton"]


@pytest.mark.parametrize("shape", [(1024, 4096), (96, 576)])
def test_lowers_to_cuda(shape: tuple[int, int]) -> None:
    w = jax.eval_shape(lambda: quantize(jnp.ones(shape, jnp.bfloat16)))
    x, dy = (jax.ShapeDtypeStruct((64, size), jnp.bfloat16) for size in reversed(shape))

    def both(x: Any, w: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(lambda x: fp8_matmul(x, w), x)
        return y, pullback(dy)

    text = lower_for_cuda(both, x, w, dy)
    assert text.count("nf4_decode_fp8") >= 2
    assert "f8E4M3FN" in text


# What adapted layers marked fp8 are compared with: the same layers, with the base in float64. Of the result the base is
# the larger part, so its error is what remains of e4m3's; gradients of the adapters see none of it but through h.
BLOCKS = ("lora_linear", "norm_linear", "glu_linear")


def layers(k: int, exclude: tuple[int, ...] = (), rank: int = 8) -> tuple[Projection, ...]:
    made = []
    for i, n in enumerate((96, 32, 32)):
        a, b = jnp.asarray(0.1 * normal(20 + i, rank, k)), jnp.asarray(0.3 * normal(30 + i, n, rank))
        made.append(Projection(weights(n, k), jnp.asarray(normal(40 + i, n)), a, b, fp8=i not in exclude))
    return tuple(made)


def block(name: str, group: tuple[Projection, ...], rate: float = 0.0) -> Any:
    """The op on rows [M, K] as a function of rows and the adapters, and how many of the group it takes."""
    options: Any = {"scaling": 1.5, "dropout_rate": rate, "dropout_key": jax.random.key(5) if rate else None}

    def call(x: Any, adapters: Any) -> Any:
        trained = [dataclasses.replace(p, lora_a=a, lora_b=b) for p, (a, b) in zip(group, adapters)]
        if name == "lora_linear":
            return grouped_lora_linear(x, trained, **options)
        if name == "norm_linear":
            return norm_linear(x, jnp.asarray(1 + 0.1 * normal(11, K)), trained, residual=x, name="qkv", **options)
        return glu_linear(jnp.concatenate([x, x[:, ::-1]], 1), trained[0], name="down", **options)

    return call


def gradients(function: Any, x: Any, adapters: Any) -> Any:
    y, pullback = jax.vjp(function, x, adapters)
    return y, pullback(jax.tree.map(lambda leaf: jnp.asarray(normal(12, *leaf.shape), leaf.dtype), y))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "exclude"),
    [("lora_linear", ()), ("lora_linear", (1,)), ("norm_linear", ()), ("norm_linear", (0, 2)), ("glu_linear", ())],
)
def test_blocks(name: str, exclude: tuple[int, ...], rate: float) -> None:
    """Values and every gradient against the same block without 8 bits; with members that are left out."""
    group = layers(K, exclude)
    x, adapters = jnp.asarray(normal(13, M, K)), [(p.lora_a, p.lora_b) for p in group[: 1 if name == BLOCKS[2] else 3]]
    plain = tuple(dataclasses.replace(p, fp8=False) for p in group)
    ours = jax.tree.leaves(gradients(block(name, group, rate), x, adapters))
    wanted = jax.tree.leaves(gradients(block(name, plain, rate), x, adapters))
    for actual, true in zip(ours, wanted, strict=True):
        assert off(actual, np.float64(true)) < 1.1 * ERROR
    # The adapters' own gradients are of exact inputs: x, and dY.
    if name != "norm_linear":
        for actual, true in zip(ours[2:], wanted[2:], strict=True):
            assert off(actual, np.float64(true)) < 1e-5


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("name", BLOCKS)
def test_exact_forward(name: str, rate: float) -> None:
    """Values as without 8 bits, and gradients as with them: separate, and extended by the adapters."""
    group = layers(K)
    x, adapters = jnp.asarray(normal(13, M, K)), [(p.lora_a, p.lora_b) for p in group[: 1 if name == BLOCKS[2] else 3]]
    plain, both, ours = (
        tuple(dataclasses.replace(p, fp8=fp8, exact_forward=exact) for p in group)
        for fp8, exact in ((False, False), (True, False), (True, True))
    )
    y, gradient = gradients(block(name, ours, rate), x, adapters)
    # Separate: the definition's own order of sums.
    assert off(jax.tree.leaves(y)[0], np.float64(jax.tree.leaves(block(name, plain, rate)(x, adapters))[0])) < 1e-6
    wanted = gradients(block(name, both, rate), x, adapters)[1]
    with interpreted():
        extended = gradients(block(name, ours, rate), x, adapters)
    for actual, other, true in zip(*map(jax.tree.leaves, (gradient, extended[1], wanted)), strict=True):
        assert off(actual, np.float64(true)) < 1e-5
        assert off(other, np.float64(true)) < 1e-5
    assert off(jax.tree.leaves(extended[0])[0], np.float64(jax.tree.leaves(y)[0])) < 1e-6


def test_what_blocks_keep_for_the_backward_pass() -> None:
    """x in its own dtype, once; nothing of a weight's size, and nothing in 8 bits."""
    group = layers(K)
    adapters = [(p.lora_a, p.lora_b) for p in group]
    x = jnp.asarray(normal(14, M, K), jnp.bfloat16)
    for function in (block(name, group) for name in BLOCKS[:2]):
        pullback = jax.eval_shape(lambda x, f=function: jax.vjp(f, x, adapters)[1], x)
        kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape and leaf.shape[0] == M]
        assert sum(leaf.shape == (M, K) for leaf in kept) == 1
        assert not any("float8" in leaf.dtype.name for leaf in jax.tree.leaves(pullback))


def test_a_layer_marked_fp8_is_computed_so_or_refused() -> None:
    x, group = jnp.asarray(normal(15, M, K)), layers(K)
    for implementation in ("xla", "triton", "few_rows"):
        with pytest.raises(NotImplementedError, match="marked fp8"):
            grouped_lora_linear(x, group, implementation=implementation)
    with pytest.raises(NotImplementedError, match="no layer is marked fp8"):
        grouped_lora_linear(x, [dataclasses.replace(group[0], fp8=False)], implementation="fp8")
    bare = [Projection(p.weight, fp8=True) for p in group]
    wanted = np.concatenate([np.asarray(fp8_matmul(x, p.weight)) for p in group], axis=1)
    np.testing.assert_allclose(grouped_lora_linear(x, bare), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_lower_to_cuda(name: str) -> None:
    group = layers(K)
    adapters = [(p.lora_a, p.lora_b) for p in group[: 1 if name == BLOCKS[2] else 3]]
    x = jnp.ones((M, K), jnp.bfloat16)
    text = lower_for_cuda(lambda x, adapters: gradients(block(name, group), x, adapters), x, adapters)
    assert "f8E4M3FN" in text
    assert "nf4_decode_fp8" in text
    assert "fp8_quantize_rows" in text
    assert "fp8_finish" in text
