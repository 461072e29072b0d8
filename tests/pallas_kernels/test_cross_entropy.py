"""Head and loss as one op against float64 truth: values, gradient, chunks, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.cross_entropy import decoded_head, head_logits, linear_cross_entropy, quantize_head
from pallas_kernels.cross_entropy import head as head_module
from pallas_kernels.cross_entropy import triton as softmax
from pallas_kernels.cross_entropy import xla as cross_entropy_xla
from pallas_kernels.cross_entropy.api import chunk_tokens
from pallas_kernels.cross_entropy.reference import linear_cross_entropy_reference
from pallas_kernels.nf4 import dequantize, quantize

B, T, D, V = 3, 29, 20, 211


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def inputs(dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(B, T, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), dtype)
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.7), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), weights


def truth(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    cap: float | None = None,
    scale: float = 1.0,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and its gradients with respect to hidden and to the head, in float64."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = raw = scale * (hidden @ head.T)
    if cap is not None:
        logits = cap * np.tanh(raw / cap)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(
        -1, keepdims=True
    )
    one_hot = np.eye(V)[np.asarray(targets)]
    loss = (weights * (log_z[..., 0] - (logits * one_hot).sum(-1))).sum()
    slope = scale if cap is None else scale / np.cosh(raw / cap) ** 2
    d_logits = weights[..., None] * (np.exp(logits - log_z) - one_hot) * slope
    return loss, d_logits @ head, np.einsum("btv,btd->vd", d_logits, hidden)


@pytest.mark.parametrize("chunk", [None, 1, 12, 87, 1000])
def test_values_and_gradient(chunk: int | None) -> None:
    hidden, head, targets, weights = inputs()
    loss, gradient = jax.value_and_grad(lambda h: 3.0 * linear_cross_entropy(h, head, targets, weights, chunk=chunk))(
        hidden
    )
    expected_loss, expected_gradient, _ = truth(hidden, head, targets, weights)
    np.testing.assert_allclose(loss, 3 * expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, 3 * expected_gradient, atol=1e-5)
    np.testing.assert_allclose(
        linear_cross_entropy(hidden, head, targets, weights, chunk=chunk), expected_loss, rtol=1e-6
    )


@pytest.mark.parametrize("cap", [3.0, 30.0])
def test_soft_capped_logits(cap: float) -> None:
    hidden, head, targets, weights = inputs()
    assert np.abs(hidden @ head.T).max() > 4 * 3
    loss, gradient = jax.value_and_grad(lambda h: linear_cross_entropy(h, head, targets, weights, cap=cap, chunk=12))(
        hidden
    )
    expected_loss, expected_gradient, _ = truth(hidden, head, targets, weights, cap)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    reference = linear_cross_entropy_reference(hidden, head, targets, weights, cap)
    np.testing.assert_allclose(reference, expected_loss, rtol=1e-6)
    with pytest.raises(ValueError, match="pass a positive number"):
        linear_cross_entropy(hidden, head, targets, weights, cap=0.0)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_bfloat16_error_is_that_of_the_reference(implementation: str) -> None:
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    expected = truth(hidden, head, targets, weights)[1]

    def error(function: object) -> float:
        gradient = jax.grad(lambda h: function(h, head, targets, weights))(hidden)
        return float(np.linalg.norm(np.asarray(gradient, np.float64) - expected) / np.linalg.norm(expected))

    ours = error(lambda *x: linear_cross_entropy(*x, implementation=implementation))
    assert ours < 1.5 * error(linear_cross_entropy_reference)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("cap", [None, 30.0])
def test_softmax_through_triton_of_several_tiles(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of some tiles and a part of one, logits of any size, and what the kernels become on a GPU."""
    monkeypatch.setattr(softmax, "_TILE", 64)
    rng = np.random.default_rng(0)
    products = jnp.asarray(rng.normal(size=(5, V)) * [[1], [10], [1e3], [1e-3], [1]] - [[0], [0], [1e3], [0], [80]])
    target, weight = jnp.asarray(rng.integers(0, V, 5)), jnp.asarray(rng.random(5), jnp.float32)

    def defined(products: jax.Array) -> jax.Array:
        logits = products if cap is None else cap * jnp.tanh(products / cap)
        return weight * -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0]

    losses, gradient = softmax.softmax_triton(products, target, weight, jnp.float32, 1.0, cap)
    np.testing.assert_allclose(losses, defined(products), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: defined(x).sum())(products), atol=2e-6)


def test_softmax_through_triton_lowers_and_says_what_it_refuses() -> None:
    def loss(*inputs: jax.Array) -> jax.Array:
        return linear_cross_entropy(*inputs, cap=30.0, implementation="triton")

    assert lower_for_cuda(jax.value_and_grad(loss), *inputs(jnp.bfloat16)[:3]).count("@__gpu$xla.gpu.triton") == 2
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        loss(*inputs()[:3])
    assert "several devices" in (softmax.unsupported_reason(1, True) or "")
    assert "32 bits" in (softmax.unsupported_reason(2**31, False) or "")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("chunk", "implementation"), [(12, "xla"), (1000, "xla"), (40, "triton")])
@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (None, 0.3), (4.0, 2.5), (4.0, -2.5)])
def test_a_trained_head_and_a_scale_of_the_logits(
    cap: float | None, scale: float, chunk: int, implementation: str
) -> None:
    hidden, head, targets, weights = inputs()
    form = {"cap": cap, "logit_scale": scale, "chunk": chunk, "implementation": implementation}

    def loss_of(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 3.0 * linear_cross_entropy(hidden, head, targets, weights, train_head=True, **form)

    loss, gradients = jax.value_and_grad(loss_of, argnums=(0, 1))(hidden, head)
    expected_loss, *expected = truth(hidden, head, targets, weights, cap, scale)
    np.testing.assert_allclose(loss, 3 * expected_loss, rtol=1e-6)
    for ours, true in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, 3 * true, atol=3e-5)
    reference = linear_cross_entropy_reference(hidden, head, targets, weights, cap, scale)
    np.testing.assert_allclose(reference, expected_loss, rtol=1e-6)
    frozen = jax.grad(lambda head: linear_cross_entropy(hidden, head, targets, weights, **form))(head)
    assert not np.any(frozen)


def test_a_trained_head_in_bfloat16_is_rounded_once() -> None:
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    expected = truth(hidden, head, targets, weights)[2]

    def error(function: object) -> float:
        gradient = jax.grad(lambda head: function(hidden, head, targets, weights))(head)
        assert gradient.dtype == jnp.bfloat16
        return float(np.linalg.norm(np.asarray(gradient, np.float64) - expected) / np.linalg.norm(expected))

    ours = error(lambda *x: linear_cross_entropy(*x, train_head=True, chunk=12))
    assert ours < 1.5 * error(linear_cross_entropy_reference)


def test_ignored_targets_and_no_weights() -> None:
    hidden, head, targets, weights = inputs()
    learnt = np.asarray(weights) > 0
    marked = jnp.where(learnt, targets, -100)
    loss, gradient = jax.value_and_grad(lambda h: linear_cross_entropy(h, head, marked, ignore_index=-100))(hidden)
    expected_loss, expected_gradient, _ = truth(hidden, head, targets, learnt)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_tokens_without_weight_get_no_gradient() -> None:
    hidden, head, targets, weights = inputs()
    gradient = jax.grad(lambda h: linear_cross_entropy(h, head, targets, weights))(hidden)
    unlearnt = np.asarray(weights) == 0
    assert unlearnt.any()
    assert np.all(np.asarray(gradient)[unlearnt] == 0)
    assert np.all(np.any(np.asarray(gradient)[~unlearnt] != 0, axis=-1))


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, vocab, width, chunk = 2048, 5000, 16, 128
    shapes = [
        ((1, tokens, width), jnp.float32),
        ((vocab, width), jnp.float32),
        ((1, tokens), jnp.int32),
        ((1, tokens), jnp.float32),
    ]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    step = jax.jit(jax.value_and_grad(lambda *x: linear_cross_entropy(*x, chunk=chunk)))
    temporaries = step.lower(*abstract).compile().memory_analysis().temp_size_in_bytes
    chunk_logits, all_logits = 4 * chunk * vocab, 4 * tokens * vocab
    assert temporaries < 4 * chunk_logits + 4 * 4 * tokens * width < all_logits / 2


def test_the_default_chunk_fits_its_budget() -> None:
    assert chunk_tokens(128256) == 512
    assert chunk_tokens(49152, 2**20) == 16
    assert 4 * 49152 * chunk_tokens(49152) <= 256 * 2**20
    hidden, head, targets, weights = inputs()
    loss = lambda h: linear_cross_entropy(h, head, targets, weights, budget_bytes=4 * V * 16)  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(hidden).as_text()
    # Sixteen tokens over three rows.
    assert f"tensor<{B}x5x{V}xf32>" in text
    assert f"tensor<{B}x{T}x{V}xf32>" not in text


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head, targets, weights = inputs()
    with pytest.raises(ValueError, match=r"must be \[B, T, D\]"):
        linear_cross_entropy(hidden, head, targets[:, 1:], weights)


def test_tokens_without_weight_do_not_reach_the_head() -> None:
    """Only one token in nine is learnt: the head runs once for each chunk of those, whatever they lie beside."""
    rng = np.random.default_rng(1)
    hidden, head = jnp.asarray(rng.normal(size=(2, 90, D)), jnp.float32), inputs()[1]
    targets = jnp.asarray(rng.integers(0, V, (2, 90)), jnp.int32)
    weights = jnp.asarray(np.arange(180).reshape(2, 90) % 9 == 4, jnp.float32)
    chunks = []

    def counting(h: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: chunks.append(1))
        return original(h, *rest)

    original = cross_entropy_xla._chunk_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_xla, "_chunk_loss", counting)
        loss, gradient = jax.value_and_grad(lambda h: linear_cross_entropy(h, head, targets, weights, chunk=8))(hidden)
        jax.effects_barrier()
    expected_loss, expected_gradient, _ = truth(hidden, head, targets, weights)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    # Ten learnt tokens a row, four of a row in a chunk of eight.
    assert len(chunks) == 3


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_a_packed_head_is_decoded_some_rows_at_a_time(
    rows: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, targets, weights = inputs()
    rng = np.random.default_rng(4)
    hidden = jnp.asarray(rng.normal(size=(B, T, 192)), jnp.float32)
    packed = quantize(jnp.asarray(rng.normal(size=(V, 192)) / 8, jnp.float32), double_quant=double_quant)
    monkeypatch.setattr(head_module, "DECODED_BYTES", rows * 192 * 4)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda h, w: linear_cross_entropy(h, w, targets, weights, cap=5.0, chunk=12))
    )(hidden, packed)
    expected_loss, expected_gradient, _ = truth(hidden, dequantize(packed), targets, weights, 5.0)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    np.testing.assert_allclose(
        linear_cross_entropy_reference(hidden, packed, targets, weights, 5.0), expected_loss, rtol=1e-6
    )


@pytest.mark.parametrize("rows", [40, 1000])
def test_a_head_in_8_bits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, weights = inputs()
    monkeypatch.setattr(head_module, "DECODED_BYTES", rows * D * 4)
    small = quantize_head(head)
    decoded = np.asarray(small.values, np.float64) * np.asarray(small.scales)[:, None]
    largest = np.abs(np.asarray(head)).max(axis=1, keepdims=True)
    assert np.all(np.abs(decoded - np.asarray(head)) <= largest * (0.5 / 127 + 1e-6))
    loss, gradient = jax.value_and_grad(lambda h: linear_cross_entropy(h, small, targets, weights, cap=5.0, chunk=12))(
        hidden
    )
    expected_loss, expected_gradient, _ = truth(hidden, decoded, targets, weights, 5.0)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    reference = linear_cross_entropy_reference(hidden, small, targets, weights, 5.0)
    np.testing.assert_allclose(reference, expected_loss, rtol=1e-6)


@pytest.mark.parametrize("to_small", [quantize, quantize_head])
def test_a_head_in_few_bits_is_never_whole(to_small: Callable[[jax.Array], Any]) -> None:
    d, v = 512, 32000
    packed = jax.eval_shape(to_small, jax.ShapeDtypeStruct((v, d), jnp.bfloat16))
    hidden, row = jax.ShapeDtypeStruct((1, 16, d), jnp.bfloat16), jax.ShapeDtypeStruct((1, 16), jnp.float32)
    step = jax.grad(lambda h, w, y, x: linear_cross_entropy(h, w, y, x, chunk=16))
    targets = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "DECODED_BYTES", 2**20)
        temporaries = jax.jit(step).lower(hidden, packed, targets, row).compile().memory_analysis().temp_size_in_bytes
    # Less than the float32 that XLA makes of one decoded head on a CPU; the logits and plain scales are there.
    assert temporaries < v * d * 2


def test_packed_heads_that_do_not_fit_are_refused() -> None:
    hidden, _, targets, weights = inputs()
    with pytest.raises(NotImplementedError, match="rows that are not whole blocks of 64; pass it decoded"):
        linear_cross_entropy(hidden, quantize(jnp.ones((V, D))), targets, weights)
    with pytest.raises(ValueError, match=r"a stack \(2,\) of packed weights"):
        linear_cross_entropy(hidden, quantize(jnp.ones((2, V, D))), targets, weights)
    for small in (quantize(jnp.ones((V, 64))), quantize_head(jnp.ones((V, D)))):
        with pytest.raises(ValueError, match="has no gradient; train a dense head"):
            linear_cross_entropy(hidden, small, targets, weights, train_head=True)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("implementation", ["triton", "xla", None])
def test_logits_of_a_packed_head_are_float32(rows: int, implementation: str | None) -> None:
    rng = np.random.default_rng(rows)
    hidden = jnp.asarray(rng.normal(size=(1, rows, 128)), jnp.bfloat16)
    head = quantize(jnp.asarray(rng.normal(size=(301, 128)), jnp.bfloat16))
    weight = np.asarray(dequantize(dataclasses.replace(head, dtype="float32")), np.float64)
    truth = np.asarray(hidden, np.float64) @ weight.T
    own = np.linalg.norm(np.asarray(head_logits(hidden, dequantize(head)), np.float64) - truth)
    with interpreted():
        if implementation == "triton" and rows > 64:
            with pytest.raises(NotImplementedError, match="70 rows of bfloat16 are too many"):
                head_logits(hidden, head, "triton")
            return
        values = head_logits(hidden, head, implementation)
    assert np.any(values != values.astype(jnp.bfloat16))
    # As for any product with a packed weight: what rounding it to bfloat16 promises (test_nf4_matmul_sizes.py).
    limit = max(1.5 * own, 2.0**-8 * np.linalg.norm(truth))
    assert np.linalg.norm(np.asarray(values, np.float64) - truth) <= limit
    small = quantize_head(dequantize(head))
    eight = head_logits(hidden, small)
    np.testing.assert_allclose(eight, head_logits(hidden, decoded_head(small, jnp.bfloat16)), rtol=1e-5, atol=1e-4)
