"""Residual, norm and adapted layers as one block: against float64 truth in every form, and lowered to CUDA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import (
    EPS,
    GROUPS,
    KEY,
    SCALING,
    M,
    bfloat16_errors,
    compare,
    keep_factors,
    kernels,
    projections,
    true_linear,
)

from pallas_kernels._device import lower_for_cuda
from pallas_kernels.lora_linear import Projection
from pallas_kernels.nf4 import dequantize, quantize
from pallas_kernels.norm_linear import norm_linear
from pallas_kernels.norm_linear.reference import norm_linear_reference

K = 320


def true_norm(total: Any, scale: Any) -> Any:
    return total / jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True) + EPS) * scale


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("with_residual", "rate", "unit_offset"), [(True, 0.0, True), (False, 0.4, False), (True, 0.4, False)]
)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_values_and_gradients(implementation: str, with_residual: bool, rate: float, unit_offset: bool) -> None:
    members = projections(3, K, GROUPS["three"], bias=True)
    # A batch of rows, as the model has it.
    x, residual = normal(1, 1, M, K), normal(2, 1, M, K) if with_residual else None
    scale = 0.3 * normal(3, K) + (0.0 if unit_offset else 1.0)
    keep = keep_factors(len(members), K, rate) if rate else None

    def ours(x: Any, residual: Any, members: Any) -> Any:
        return norm_linear(
            x,
            scale,
            members,
            residual=residual,
            eps=EPS,
            unit_offset=unit_offset,
            scaling=SCALING,
            dropout_rate=rate,
            dropout_key=KEY,
            name="block",
            implementation=implementation,
        )

    def truth(x: Any, residual: Any, members: Any) -> Any:
        total = x if residual is None else x + residual
        return true_linear(true_norm(total, scale + unit_offset), members, keep), total

    with kernels():
        compare(ours, truth, (x, residual, members), 1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows(rows: int) -> None:
    """One row in float32 lanes, several on tensor cores."""
    members = projections(7, K, GROUPS["one without an adapter"], bias=True)
    scale = jnp.ones(K, jnp.float32)
    x = normal(8, rows, K).astype(jnp.float32 if rows == 1 else jnp.bfloat16)

    def ours(x: Any, members: Any) -> Any:
        return norm_linear(x, scale, members, eps=EPS, scaling=SCALING, implementation="few_rows")[0]

    # A result in bf16 is rounded three times (product, adapter's part, sum), its input once.
    with kernels():
        compare(
            ours,
            lambda x, members: true_linear(true_norm(x, scale), members),
            (x, members),
            1e-6 if rows == 1 else 2 * 2.0**-8,
        )


def test_bfloat16_error_is_that_of_the_reference() -> None:
    weights = [quantize(0.06 * normal(i, n, K), dtype=jnp.bfloat16) for i, n in enumerate((96, 64))]
    adapters = [(0.06 * normal(i + 4, 8, K), 0.3 * normal(i + 6, w.shape[0], 8)) for i, w in enumerate(weights)]
    scale = (1 + 0.3 * normal(9, K)).astype(jnp.bfloat16)

    def by(f: Any, **named: Any) -> Any:
        def call(x: Any, residual: Any, adapters: Any) -> Any:
            group = [Projection(w, None, *adapter) for w, adapter in zip(weights, adapters, strict=True)]
            # The truth has the weight that the bytes mean, as bfloat16 holds it, and no further rounding.
            if x.dtype == jnp.float32:
                group = [Projection(dequantize(p.weight).astype(jnp.float32), None, p.lora_a, p.lora_b) for p in group]
            return f(x, scale.astype(x.dtype), group, residual=residual, eps=EPS, scaling=SCALING, **named)

        return call

    functions = {name: by(norm_linear, implementation=name) for name in ("xla", "triton")}
    with kernels():
        ours, reference = bfloat16_errors(
            functions | {"reference": by(norm_linear_reference)}, (normal(10, 40, K), normal(11, 40, K), adapters)
        )
    for name, errors in ours.items():
        assert all(a <= 1.5 * b for a, b in zip(errors, reference, strict=True)), (name, errors, reference)


def test_lowers_to_cuda() -> None:
    """Gate and up of Llama-3-8B, forward and backward: two norm kernels, and each weight decoded once a pass."""
    k, n, m, rank = 4096, 14336, 256, 64
    weight = jax.eval_shape(lambda: quantize(jnp.ones((n, k), jnp.bfloat16)))
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    adapter = jax.ShapeDtypeStruct((rank, k), jnp.float32), jax.ShapeDtypeStruct((n, rank), jnp.float32)

    def both(x: Any, residual: Any, scale: Any, weights: Any, adapters: Any) -> Any:
        def block(x: Any, residual: Any, adapters: Any) -> Any:
            group = [Projection(w, None, *a) for w, a in zip(weights, adapters, strict=True)]
            return norm_linear(x, scale, group, residual=residual, implementation="triton")

        results, pullback = jax.vjp(block, x, residual, adapters)
        return pullback(results)

    text = lower_for_cuda(both, x, x, jax.ShapeDtypeStruct((k,), jnp.bfloat16), (weight, weight), (adapter, adapter))
    assert text.count("@__gpu$xla.gpu.triton(") == 2 + 2 * 2


def test_what_does_not_fit_is_refused() -> None:
    members = projections(3, K, GROUPS["one"])
    x, scale = jnp.ones((2, K)), jnp.ones(K)
    with pytest.raises(ValueError, match=r"scale must be \[320\] and the residual like x"):
        norm_linear(x, jnp.ones(K + 1), members)
    with pytest.raises(ValueError, match="residual like x"):
        norm_linear(x, scale, members, residual=jnp.ones((3, K)))
    with pytest.raises(ValueError, match="there is no projection"):
        norm_linear(x, scale, [])
    with kernels(), pytest.raises(NotImplementedError, match="there is no adapter to append"):
        norm_linear(x, scale, [Projection(members[0].weight)], implementation="triton")
