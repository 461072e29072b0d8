"""The adapted linear layer against float64 truth: values, every gradient, and what it does not make."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import GROUPS, KEY, SCALING, compare, keep_factors, kernels, projections, true_linear
from adapted import M as ROWS

from pallas_kernels.lora_linear import Projection, grouped_lora_linear, lora_linear
from pallas_kernels.lora_linear.reference import lora_linear_reference
from pallas_kernels.nf4 import dequantize, quantize

M, N, K, R = 23, 37, 70, 5


def inputs(dtype: jnp.dtype = jnp.float32, bias: bool = True) -> tuple:
    rng = np.random.default_rng(0)
    x, w, b, a, bb = (rng.normal(size=shape) for shape in ((M, K), (N, K), (N,), (R, K), (N, R)))
    cast = [jnp.asarray(v, dtype) for v in (x, w * 0.2, b)] + [
        jnp.asarray(a * 0.3, jnp.float32),
        jnp.asarray(bb, jnp.float32),
    ]
    return cast[0], cast[1], cast[2] if bias else None, cast[3], cast[4]


def truth(x: jax.Array, w: jax.Array, b: jax.Array | None, a: jax.Array, bb: jax.Array, dy: jax.Array) -> dict:
    """Values and gradients in float64, from the matrix calculus."""
    x, w, a, bb, dy = (np.asarray(v, np.float64) for v in (x, w, a, bb, dy))
    y = x @ w.T + SCALING * (x @ a.T) @ bb.T + (0 if b is None else np.asarray(b, np.float64))
    return {
        "y": y,
        "dx": dy @ w + SCALING * (dy @ bb) @ a,
        "da": SCALING * (dy @ bb).T @ x,
        "db": SCALING * dy.T @ (x @ a.T),
    }


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(packed: bool, bias: bool) -> None:
    x, w, b, a, bb = inputs(bias=bias)
    weight = quantize(w) if packed else w
    dense = dequantize(weight) if packed else w
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(M, N)), jnp.float32)
    y, pullback = jax.vjp(lambda x, a, bb: lora_linear(x, weight, b, a, bb, scaling=SCALING), x, a, bb)
    dx, da, db = pullback(dy)
    expected = truth(x, dense, b, a, bb, dy)
    for name, actual in {"y": y, "dx": dx, "da": da, "db": db}.items():
        assert relative_error(actual, expected[name]) < 1e-6, name


def test_bfloat16_error_is_that_of_the_reference() -> None:
    x, w, b, a, bb = inputs(jnp.bfloat16)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(M, N)), jnp.bfloat16)
    expected = truth(x, w, b, a, bb, dy)

    def errors(function: object) -> dict[str, float]:
        y, pullback = jax.vjp(function, x, a, bb)
        return {name: relative_error(v, expected[name]) for name, v in zip(("y", "dx", "da", "db"), (y, *pullback(dy)))}

    ours = errors(lambda x, a, bb: lora_linear(x, w, b, a, bb, scaling=SCALING))
    low = lambda v: v.astype(jnp.bfloat16)  # noqa: E731
    reference = errors(lambda x, a, bb: lora_linear_reference(x, w, b, low(a), low(bb), SCALING, None))
    for name in ours:
        assert ours[name] < 1.5 * reference[name], (name, ours, reference)


def test_dropout_acts_on_the_adapter_alone() -> None:
    x, w, _, a, bb = inputs()
    key, rate = jax.random.key(3), 0.4
    keep = jax.random.bernoulli(jax.random.fold_in(key, 0), 1 - rate, x.shape) / (1 - rate)

    def ours(x: jax.Array, a: jax.Array, bb: jax.Array) -> jax.Array:
        return lora_linear(x, w, None, a, bb, scaling=SCALING, dropout_rate=rate, dropout_key=key)

    y, pullback = jax.vjp(ours, x, a, bb)
    expected, reference_pullback = jax.vjp(
        lambda x, a, bb: lora_linear_reference(x, w, None, a, bb, SCALING, keep), x, a, bb
    )
    for actual, wanted in zip((y, *pullback(y)), (expected, *reference_pullback(expected))):
        assert relative_error(actual, np.asarray(wanted, np.float64)) < 2e-6
    without_adapter = lora_linear(x, w, dropout_rate=rate, dropout_key=key)
    np.testing.assert_array_equal(without_adapter, lora_linear(x, w))


def test_no_gradient_of_a_weights_size_is_made() -> None:
    n, k, m = 320, 448, 4
    weight = quantize(jnp.ones((n, k), jnp.float32))
    a, b = jnp.ones((2, k)), jnp.ones((n, 2))
    loss = lambda a, b, x: jnp.sum(lora_linear(x, weight, None, a, b) ** 2)  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(a, b, jnp.ones((m, k)))
    contractions_over_tokens = [
        eqn
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape in ((n, k), (k, n))
    ]
    assert not contractions_over_tokens


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("group", [*GROUPS, "one, wide"])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_groups_of_packed_layers(implementation: str, group: str, rate: float) -> None:
    """Ranks from 1 to 512, layers without an adapter, biases, dropout of each layer's own."""
    k = 192
    members = projections(0, k, GROUPS.get(group, ((256, 8),)), bias=True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, k)), jnp.float32)
    keep = keep_factors(len(members), k, rate) if rate else None

    def ours(x: Any, members: Any) -> Any:
        return grouped_lora_linear(
            x, members, scaling=SCALING, dropout_rate=rate, dropout_key=KEY, implementation=implementation
        )

    with kernels():
        compare(ours, lambda x, members: true_linear(x, members, keep), (x, members), 1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows(rows: int) -> None:
    """One row in float32 lanes, several on tensor cores: against the truth, and against XLA's rounding."""
    k = 192
    members = projections(7, k, GROUPS["one without an adapter"], bias=True)
    x = jnp.asarray(np.random.default_rng(8).standard_normal((rows, k)), jnp.float32 if rows == 1 else jnp.bfloat16)

    def linear(x: Any, members: Any, implementation: str | None = "few_rows") -> Any:
        return grouped_lora_linear(x, members, scaling=SCALING, implementation=implementation)

    # A result in bf16 is rounded three times: product, adapter's part, sum.
    with kernels():
        np.testing.assert_array_equal(linear(x, members), linear(x, members, None))
        compare(linear, true_linear, (x, members), 1e-6 if rows == 1 else 2 * 2.0**-8)
    with pytest.raises(NotImplementedError, match="a dense weight has nothing to decode"), kernels():
        linear(x, [Projection(jnp.ones((4, k)))])


def test_stacked_layers_scan_to_the_same_values() -> None:
    rng = np.random.default_rng(2)
    stack = jnp.asarray(rng.normal(size=(3, 64, 64)) * 0.1, jnp.float32)
    x = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    scanned, _ = jax.lax.scan(lambda h, w: (lora_linear(h, w), None), x, quantize(stack))
    looped = x
    for layer in range(3):
        looped = lora_linear(looped, quantize(stack[layer]))
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"x": jnp.ones((2, K + 1))}, "needs 70"),
        ({"lora_b": None}, "come together"),
        ({"lora_b": jnp.ones((N, R + 1))}, r"must be \[R, 70\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict, rule: str) -> None:
    x, w, b, a, bb = inputs()
    arguments = {"x": x, "weight": w, "bias": b, "lora_a": a, "lora_b": bb} | changes
    with pytest.raises(ValueError, match=rule):
        lora_linear(**arguments)
