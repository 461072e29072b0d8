"""lora_linear, norm_linear and glu_linear in all forms against float64 truth, and lowered to CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import compute_capability
from pallas_kernels._triton import interpreted
from pallas_kernels.glu_linear import glu_linear
from pallas_kernels.lora_linear import Projection, grouped_lora_linear
from pallas_kernels.nf4 import dequantize, quantize
from pallas_kernels.norm_linear import norm_linear

M, SCALING, EPS = 7, 1.75, 1e-3
KEY = jax.random.key(5)
GROUPS = {
    "one": ((96, 1),),
    "three": ((96, 40), (32, 40), (32, 60)),
    "one without an adapter": ((64, 512), (32, 0)),
}


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """The real ones where there is a GPU, with float32 products that are float32."""
    with jax.default_matmul_precision("highest"), contextlib.nullcontext() if compute_capability() else interpreted():
        yield


def projections(seed: int, k: int, members: tuple[tuple[int, int], ...], bias: bool = False) -> tuple[Projection, ...]:
    rng = np.random.default_rng(seed)
    made = []
    for n, r in members:
        w = quantize(jnp.asarray(0.2 * rng.standard_normal((n, k)), jnp.float32))
        b = jnp.asarray(rng.standard_normal(n), jnp.float32) if bias else None
        a = jnp.asarray(0.3 * rng.standard_normal((r, k)), jnp.float32) if r else None
        bb = jnp.asarray(rng.standard_normal((n, r)), jnp.float32) if r else None
        made.append(Projection(w, b, a, bb))
    return tuple(made)


def true_linear(x: Any, group: tuple[Projection, ...], keep: list[Any] | None = None) -> Any:
    """The definition in float64; `keep` is each member's dropout factor."""
    parts = []
    for i, p in enumerate(group):
        weight = jnp.asarray(dequantize(p.weight, implementation="xla"), jnp.float64)
        y = x @ weight.T + (0 if p.bias is None else p.bias)
        if p.lora_a is not None:
            y = y + SCALING * ((x if keep is None else x * keep[i]) @ p.lora_a.T) @ p.lora_b.T
        parts.append(y)
    return jnp.concatenate(parts, axis=-1)


def keep_factors(count: int, width: int, rate: float) -> list[Any]:
    return [jax.random.bernoulli(jax.random.fold_in(KEY, i), 1 - rate, (M, width)) / (1 - rate) for i in range(count)]


def compare(
    function: Callable[..., Any], truth: Callable[..., Any], arguments: tuple[Any, ...], tolerance: float
) -> None:
    """Values and all gradients of `function` against those of `truth` in float64; `arguments` are trees."""
    floats, others = jax.tree.flatten(arguments)
    trained = [i for i, leaf in enumerate(floats) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def of(f: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
        def call(*leaves: Any) -> Any:
            full = list(floats)
            for i, leaf in zip(trained, leaves):
                full[i] = leaf.astype(dtype) if dtype == jnp.float64 else leaf
            return f(*jax.tree.unflatten(others, full))

        return call

    values, pullback = jax.vjp(of(function, None), *(floats[i] for i in trained))
    rng = np.random.default_rng(9)
    cotangent = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape), y.dtype), values)
    with jax.enable_x64(True):
        expected, true_pullback = jax.vjp(of(truth, jnp.float64), *(floats[i].astype(jnp.float64) for i in trained))
        wanted = (expected, true_pullback(jax.tree.map(lambda c: c.astype(jnp.float64), cotangent)))
    for actual, true in zip(jax.tree.leaves((values, pullback(cotangent))), jax.tree.leaves(wanted)):
        true = np.asarray(true, np.float64)
        if not np.any(np.asarray(actual)):
            continue  # frozen: scales, biases and the packed weight's own arrays have no gradient
        assert np.linalg.norm(np.asarray(actual, np.float64) - true) <= tolerance * np.linalg.norm(true)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_lora_linear(implementation: str, group: str, rate: float) -> None:
    k = 192
    members = projections(0, k, GROUPS[group], bias=True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((M, k)), jnp.float32)
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
    rng, scale = np.random.default_rng(8), jnp.ones(k, jnp.float32)
    x = jnp.asarray(rng.standard_normal((rows, k)), jnp.float32 if rows == 1 else jnp.bfloat16)

    def linear(x: Any, members: Any, implementation: str | None = "few_rows") -> Any:
        return grouped_lora_linear(x, members, scaling=SCALING, implementation=implementation)

    def normed(x: Any, members: Any) -> Any:
        return norm_linear(x, scale, members, eps=EPS, scaling=SCALING, implementation="few_rows")[0]

    def gated(x: Any, members: Any) -> Any:
        return glu_linear(jnp.concatenate([x, x], 1), members[0], scaling=SCALING, implementation="few_rows")

    def true_norm(x: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPS)

    # A result in bf16 is rounded three times (product, adapter's part, sum), its input once.
    tolerance = 1e-6 if rows == 1 else 2 * 2.0**-8
    with kernels():
        np.testing.assert_array_equal(linear(x, members), linear(x, members, None))
        for ours, truth in (
            (linear, lambda x, members: true_linear(x, members)),
            (normed, lambda x, members: true_linear(true_norm(x), members)),
            (gated, lambda x, members: true_linear(jax.nn.silu(x) * x, members[:1])),
        ):
            compare(ours, truth, (x, members), tolerance)
    with pytest.raises(NotImplementedError, match="a dense weight has nothing to decode"), kernels():
        linear(x, [Projection(jnp.ones((4, k)))])


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_norm_linear(implementation: str, with_residual: bool, rate: float) -> None:
    k = 320
    rng = np.random.default_rng(2)
    members = projections(3, k, GROUPS["three"])
    x, residual = (jnp.asarray(rng.standard_normal((M, k)), jnp.float32) for _ in range(2))
    scale = jnp.asarray(1 + 0.3 * rng.standard_normal(k), jnp.float32)
    keep = keep_factors(len(members), k, rate) if rate else None
    residual = residual if with_residual else None

    def ours(x: Any, residual: Any, members: Any) -> Any:
        return norm_linear(
            x,
            scale,
            members,
            residual=residual,
            eps=EPS,
            scaling=SCALING,
            dropout_rate=rate,
            dropout_key=KEY,
            name="block",
            implementation=implementation,
        )

    def truth(x: Any, residual: Any, members: Any) -> Any:
        total = x if residual is None else x + residual
        h = total / jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True) + EPS) * scale
        return true_linear(h, members, keep), total

    with kernels():
        compare(ours, truth, (x, residual, members), 1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_glu_linear(implementation: str, activation: str, rate: float) -> None:
    width = 320
    (projection,) = projections(4, width, ((96, 5),))
    gate_up = jnp.asarray(np.random.default_rng(6).standard_normal((M, 2 * width)), jnp.float32)
    keep = keep_factors(1, width, rate) if rate else None

    def ours(gate_up: Any, projection: Any) -> Any:
        return glu_linear(
            gate_up,
            projection,
            activation=activation,
            scaling=SCALING,
            dropout_rate=rate,
            dropout_key=KEY,
            name="block",
            implementation=implementation,
        )

    def truth(gate_up: Any, projection: Any) -> Any:
        gate, up = jnp.split(gate_up, 2, axis=-1)
        active = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return true_linear(active * up, (projection,), keep)

    with kernels():
        compare(ours, truth, (gate_up, projection), 1e-6)
