from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels.nf4 import dequantize, quantize
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.reference import nf4_matmul_reference

# (x's leading axes, out, in): none, one and several; rows that blocks cross; odd sizes; a single row.
CASES = [((), 24, 64), ((5,), 33, 96), ((2, 3), 17, 45), ((1, 1), 1, 7)]


def draw(lead, out, width, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*lead, width), np.float32).astype(dtype)
    dy = rng.standard_normal((*lead, out), np.float32).astype(dtype)
    w = (rng.standard_normal((out, width), np.float32) / np.float32(width**0.5)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(dy), jax.tree.map(jnp.asarray, quantize(w))


def value_and_dx(matmul, x, w, dy):
    y, pull = jax.vjp(lambda x: matmul(x, w), x)
    return y, pull(dy)[0]


@pytest.mark.parametrize(("lead", "out", "width"), CASES)
def test_value_and_gradient_in_float32(lead, out, width):
    x, dy, w = draw(lead, out, width)
    weight = np.asarray(dequantize(w)).astype(np.float64)
    y, dx = value_and_dx(nf4_matmul, x, w, dy)
    assert y.dtype == dx.dtype == jnp.float32
    # A float32 sum of n products is off by at most n * 2**-24 of the sum of their magnitudes, plus its last rounding.
    for got, a, b in ((y, np.asarray(x), weight.T), (dx, np.asarray(dy), weight)):
        bound = (b.shape[0] + 1) * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b))
        assert (np.abs(np.asarray(got) - a.astype(np.float64) @ b) <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("lead", "out", "width"), CASES)
def test_half_precision_is_as_good_as_the_reference(lead, out, width, dtype):
    x, dy, w = draw(lead, out, width, dtype)
    weight = np.asarray(dequantize(w)).astype(np.float64)
    truth = np.asarray(x).astype(np.float64) @ weight.T, np.asarray(dy).astype(np.float64) @ weight
    got = value_and_dx(jax.jit(nf4_matmul), x, w, dy)
    reference = value_and_dx(jax.jit(nf4_matmul_reference), x, w, dy)
    for ours, theirs, true in zip(got, reference, truth, strict=True):
        assert ours.dtype == dtype
        error = np.abs(np.asarray(ours).astype(np.float64) - true).max()
        assert error <= 1.5 * np.abs(np.asarray(theirs).astype(np.float64) - true).max()


def test_the_weight_is_rounded_to_its_own_dtype_first():
    x, _, _ = draw((4,), 8, 64)
    w = quantize(np.random.default_rng(1).standard_normal((8, 64), np.float32), dtype="bfloat16")
    weight = jnp.asarray(dequantize(w, "bfloat16").astype(np.float32))
    np.testing.assert_allclose(nf4_matmul(x, w), x @ weight.T, rtol=0, atol=65 * 2.0**-24 * 64)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_a_stack_with_and_without_checkpoint(remat):
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((3, 64, 64), np.float32) / 8
    stack = jax.tree.map(jnp.asarray, quantize(weights))
    dense = np.asarray(dequantize(stack)).astype(np.float64)
    x = jnp.asarray(rng.standard_normal((5, 64), np.float32))

    def layer(h, w):
        return nf4_matmul(h, w), None

    body = jax.checkpoint(layer) if remat else layer
    loss, dx = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jax.lax.scan(body, x, stack)[0])))(x)
    product = dense[2] @ dense[1] @ dense[0]
    true_dx = np.broadcast_to(product.sum(axis=0), (5, 64))
    assert loss == pytest.approx(float((np.asarray(x).astype(np.float64) @ product.T).sum()), rel=1e-4)
    # Three sums of 64 float32 products in a row.
    magnitude = np.abs(dense[2]).sum(axis=0) @ np.abs(dense[1]) @ np.abs(dense[0])
    assert (np.abs(np.asarray(dx) - true_dx) <= 3 * 65 * 2.0**-24 * magnitude).all()


def test_backward_keeps_the_packed_weight_only():
    x, _, w = draw((6,), 40, 128, "bfloat16")
    _, pull = jax.vjp(lambda x: nf4_matmul(x, w), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert kept <= w.nbytes


def products(jaxpr):
    """The shapes of all matrix products in a jaxpr, inner ones included."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes += [out.aval.shape for out in equation.outvars]
        for inner in jaxprs_in_params(equation.params):
            shapes += products(inner)
    return shapes


def test_no_gradient_of_the_weights_shape_is_made():
    x, _, w = draw((6,), 40, 128, "bfloat16")

    def loss(x, w):
        return jnp.sum(nf4_matmul(x, w).astype(jnp.float32) ** 2)

    # Asked for the weight's gradient too, in its floating leaves.
    graph = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, w)
    assert sorted(products(graph.jaxpr)) == [(6, 40), (6, 128)]
    _, dw = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, w)
    assert dw.codes.dtype == jax.dtypes.float0
    assert not np.asarray(dw.nested_absmax).any()
    assert not np.asarray(dw.nested_offset).any()


def test_errors_name_value_rule_and_remedy():
    x, _, w = draw((2,), 8, 64)
    with pytest.raises(ValueError, match=r"x \(2, 8\) must end in 64"):
        nf4_matmul(jnp.zeros((2, 8)), w)
    with pytest.raises(ValueError, match="scan over the stack"):
        nf4_matmul(x, jax.tree.map(lambda leaf: leaf[None], w))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; use one of 'mosaic', 'triton', 'xla'"):
        nf4_matmul(x, w, implementation="cuda")
