"""A whole MLP in slices of its width: against float64 truth, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import EPS, SCALING, M, bfloat16_errors, compare, kernels, projections, true_linear

from pallas_kernels.lora_linear import Projection
from pallas_kernels.nf4 import NF4Layer, dequantize, quantize
from pallas_kernels.nf4.triton import decode_into
from pallas_kernels.sliced_mlp import most_slices, sliced_mlp
from pallas_kernels.sliced_mlp.reference import sliced_mlp_reference

D, F = 128, 256
OPTIONS: dict[str, Any] = {"eps": EPS, "scaling": SCALING}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layers() -> tuple[Projection, ...]:
    gate, up = projections(4, D, ((F, 5), (F, 5)))
    (down,) = projections(5, F, ((D, 3),))
    return gate, up, down


def test_a_part_of_a_weight_in_its_stack_is_decoded_as_the_whole_is() -> None:
    # Rows of five blocks, so that scales of scales end within rows.
    stack = jax.tree.map(lambda *each: jnp.stack(each), *(quantize(normal(i, 96, 320)) for i in range(2)))
    whole = np.asarray(dequantize(jax.tree.map(lambda leaf: leaf[1], stack), implementation="xla"))
    with kernels():
        part = decode_into(None, NF4Layer(stack, jnp.int32(1), (48, 24, 64, 192)), jnp.float32, rows=24, columns=192)
    np.testing.assert_array_equal(part, whole[48:72, 64:256])


def test_values_and_gradients() -> None:
    scale = 0.3 * normal(3, D)

    def ours(x: Any, mlp: Any) -> Any:
        y, total = sliced_mlp(x, scale, *mlp, slices=4, unit_offset=True, **OPTIONS)
        return y, total

    def truth(x: Any, mlp: Any) -> Any:
        h = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPS) * (scale + 1.0)
        gate, up = (true_linear(h, (p,)) for p in mlp[:2])
        return true_linear(jax.nn.silu(gate) * up, mlp[2:]), x

    with kernels():
        compare(ours, truth, (normal(1, 1, M, D), layers()), 1e-6)


def test_bfloat16_error_is_that_of_the_reference() -> None:
    weights = [
        quantize(0.06 * normal(i, *shape), dtype=jnp.bfloat16) for i, shape in enumerate([(F, D)] * 2 + [(D, F)])
    ]
    adapters = [(0.06 * normal(9, 8, w.shape[1]), 0.3 * normal(8, w.shape[0], 8)) for w in weights]

    def by(f: Any) -> Any:
        def call(x: Any, adapters: Any) -> Any:
            held = [dequantize(w).astype(jnp.float32) if x.dtype == jnp.float32 else w for w in weights]
            mlp = tuple(Projection(w, None, *adapter) for w, adapter in zip(held, adapters))
            return f(x, jnp.ones(D, x.dtype), mlp)

        return call

    functions = {
        "4 slices": by(lambda x, scale, mlp: sliced_mlp(x, scale, *mlp, slices=4, scaling=SCALING)[0]),
        "reference": by(lambda *x: sliced_mlp_reference(*x, scaling=SCALING)),
    }
    with kernels():
        ours, reference = bfloat16_errors(functions, (normal(4, 40, D), adapters))
    for name, errors in ours.items():
        assert all(a <= 1.5 * b for a, b in zip(errors, reference, strict=True)), (name, errors, reference)


def test_what_it_cannot_take() -> None:
    gate, up, down = layers()
    x, scale = jnp.ones((M, D)), jnp.ones(D)
    bare = dataclasses.replace(down, lora_a=None, lora_b=None)
    with kernels():
        assert [most_slices(x, gate, up, down, wanted) for wanted in (1, 3, 4, 9)] == [1, 2, 4, 4]
        assert most_slices(x, gate, up, bare, 4) == 0
        with pytest.raises(NotImplementedError, match="256 is not 8 slices of whole blocks of 64"):
            sliced_mlp(x, scale, gate, up, down, slices=8)
    with pytest.raises(ValueError, match=r"up \(128, 128\), .* must be"):
        sliced_mlp(x, scale, gate, projections(4, D, ((F // 2, 5),))[0], down, slices=1)
