"""A gated unit and the adapted layer behind it as one block: against float64 truth, and lowered to CUDA in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import KEY, SCALING, M, bfloat16_errors, compare, keep_factors, kernels, projections, true_linear

from pallas_kernels._device import lower_for_cuda
from pallas_kernels.glu_linear import glu_linear
from pallas_kernels.glu_linear.reference import glu_linear_reference
from pallas_kernels.lora_linear import Projection
from pallas_kernels.nf4 import dequantize, quantize

WIDTH = 320
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def truth(activation: str, gate_up: Any, projection: Any, keep: Any = None) -> Any:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return true_linear(ACTIVATIONS[activation](gate) * up, (projection,), keep)


@pytest.mark.parametrize(("activation", "rate"), [("silu", 0.4), ("gelu_tanh", 0.0), ("gelu", 0.0)])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_values_and_gradients(implementation: str, activation: str, rate: float) -> None:
    (projection,) = projections(4, WIDTH, ((96, 5),), bias=True)
    keep = keep_factors(1, WIDTH, rate) if rate else None

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

    with kernels():
        # A batch of rows, as the model has it.
        compare(ours, lambda *x: truth(activation, *x, keep), (normal(6, 1, M, 2 * WIDTH), projection), 1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows(rows: int) -> None:
    (projection,) = projections(7, WIDTH, ((64, 32),), bias=True)
    gate_up = normal(8, rows, 2 * WIDTH).astype(jnp.float32 if rows == 1 else jnp.bfloat16)
    with kernels():
        compare(
            lambda x, p: glu_linear(x, p, scaling=SCALING, implementation="few_rows"),
            lambda x, p: truth("silu", x, p),
            (gate_up, projection),
            # A result in bf16 is rounded three times (product, adapter's part, sum), its input twice.
            1e-6 if rows == 1 else 2 * 2.0**-8,
        )


def test_bfloat16_error_is_that_of_the_reference() -> None:
    weight = quantize(0.06 * normal(1, 96, WIDTH), dtype=jnp.bfloat16)
    adapter = 0.06 * normal(2, 8, WIDTH), 0.3 * normal(3, 96, 8)

    def by(f: Any, **named: Any) -> Any:
        def call(gate_up: Any, adapter: Any) -> Any:
            # The truth has the weight that the bytes mean, as bfloat16 holds it, and no further rounding.
            held = dequantize(weight).astype(jnp.float32) if gate_up.dtype == jnp.float32 else weight
            return f(gate_up, Projection(held, None, *adapter), scaling=SCALING, **named)

        return call

    functions = {name: by(glu_linear, implementation=name) for name in ("xla", "triton")}
    with kernels():
        ours, reference = bfloat16_errors(
            functions | {"reference": by(glu_linear_reference)}, (normal(4, 40, 2 * WIDTH), adapter)
        )
    for name, errors in ours.items():
        assert all(a <= 1.5 * b for a, b in zip(errors, reference, strict=True)), (name, errors, reference)


def test_lowers_to_cuda_and_the_gradient_is_written_over_the_input() -> None:
    """Down projection of Llama-3-8B, forward and backward."""
    n, k, m, rank = 4096, 14336, 256, 64
    weight = jax.eval_shape(lambda: quantize(jnp.ones((n, k), jnp.bfloat16)))
    adapter = jax.ShapeDtypeStruct((rank, k), jnp.float32), jax.ShapeDtypeStruct((n, rank), jnp.float32)

    def both(gate_up: Any, weight: Any, adapter: Any) -> Any:
        def block(gate_up: Any, adapter: Any) -> Any:
            return glu_linear(gate_up, Projection(weight, None, *adapter), implementation="triton")

        results, pullback = jax.vjp(block, gate_up, adapter)
        return pullback(results)

    text = lower_for_cuda(both, jax.ShapeDtypeStruct((m, 2 * k), jnp.bfloat16), weight, adapter, donate=(0,))
    # The unit, its backward pass, and the weight decoded once for each.
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton(" in line]
    assert len(calls) == 4
    assert any("output_operand_alias<" in line for line in calls)


def test_what_does_not_fit_is_refused() -> None:
    (projection,) = projections(4, WIDTH, ((96, 5),))
    with pytest.raises(ValueError, match="gate and up of one width"):
        glu_linear(jnp.ones((2, 2 * WIDTH + 1)), projection)
    with pytest.raises(ValueError, match="needs 320"):
        glu_linear(jnp.ones((2, 2 * WIDTH + 2)), projection)
    with pytest.raises(ValueError, match="silo"):
        glu_linear(jnp.ones((2, 2 * WIDTH)), projection, activation="silo")
