"""One row in generation: small launches taken together, adapters and norms read in their stacks, through Triton's
interpreter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Projection, StackLayer, glu_linear, grouped_lora_linear, norm_linear
from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.attention import AttentionParts
from pallas_kernels.nf4 import NF4Layer, quantize

LAYERS, LAYER = 3, jnp.int32(1)
RNG = np.random.default_rng(0)


def draw(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * RNG.standard_normal(shape), jnp.bfloat16)


def stacked(n: int, k: int, rank: int) -> tuple[Projection, Projection]:
    """A layer whose adapter stands in the stack of all layers, and the same with its own arrays; rank 0: none."""
    weights = [quantize(draw(n, k, scale=0.05)) for _ in range(LAYERS)]
    weight = NF4Layer(jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights), LAYER)
    if rank == 0:
        return Projection(weight), Projection(weight)
    a, b = draw(LAYERS, rank, k, scale=0.05), draw(LAYERS, n, rank, scale=0.1)
    return Projection(weight, None, StackLayer(a, LAYER), StackLayer(b, LAYER)), Projection(weight, None, a[1], b[1])


def assert_as_close(got: jax.Array, own: jax.Array, truth: jax.Array) -> None:
    """As near to the truth as what is computed in steps from arrays of its own."""
    got, own, truth = (np.asarray(x, np.float64) for x in (got, own, truth))
    assert np.linalg.norm(got - truth) <= 1.5 * np.linalg.norm(own - truth) + 1e-6 * np.linalg.norm(truth)


def exact(projection: Projection) -> Projection:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, projection)


# Widths that are a power of two and not; ranks that are, are not, and are odd; a layer without an adapter.
@pytest.mark.parametrize(("d", "ranks"), [(256, (16, 8, 3)), (192, (4, 0, 1))])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("unit_offset", [True, False])
def test_norm_and_low_rank(d: int, ranks: tuple[int, ...], with_residual: bool, unit_offset: bool) -> None:
    groups = zip(*(stacked(n, d, rank) for n, rank in zip((128, 64, 64), ranks)))
    in_stack, own = (list(group) for group in groups)
    x, residual = draw(1, 1, d), draw(1, 1, d) if with_residual else None
    scale = draw(LAYERS, d, scale=0.1)
    settings = {"eps": 1e-5, "unit_offset": unit_offset, "scaling": 2.0}
    with interpreted():
        got = norm_linear(
            x, StackLayer(scale, LAYER), in_stack, residual=residual, implementation="few_rows", **settings
        )
        alone = norm_linear(x, scale[1], own, residual=residual, implementation="few_rows", **settings)
    np.testing.assert_array_equal(got[1], alone[1])
    true = norm_linear(got[1].astype(jnp.float32), scale[1], [exact(p) for p in own], implementation="xla", **settings)
    assert_as_close(got[0], alone[0], true[0])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated_unit_and_low_rank(activation: str) -> None:
    """Columns in several spans, of which the last is not whole."""
    in_stack, own = stacked(64, 4096 + 192, 6)
    gate_up = draw(1, 1, 2 * (4096 + 192))
    with interpreted():
        got, alone = (
            glu_linear(gate_up, p, activation=activation, scaling=0.5, implementation="few_rows")
            for p in (in_stack, own)
        )
    true = glu_linear(gate_up.astype(jnp.float32), exact(own), activation=activation, scaling=0.5, implementation="xla")
    assert_as_close(got, alone, true)


def test_low_rank_alone_and_several_rows() -> None:
    in_stack, own = stacked(64, 320, 8)
    for rows in (1, 3):
        x = draw(rows, 320)
        with interpreted():
            got, alone = (grouped_lora_linear(x, [p], scaling=2.0, implementation="few_rows") for p in (in_stack, own))
        assert_as_close(got, alone, grouped_lora_linear(x.astype(jnp.float32), [exact(own)], scaling=2.0))


@pytest.mark.parametrize(("heads", "width", "rows"), [(8, 32, 1), (3, 128, 1), (40, 128, 1), (4, 16, 2)])
def test_parts_of_attention_are_joined(heads: int, width: int, rows: int) -> None:
    """Widths that are a power of two and not, and beyond one span; some parts saw nothing; rows that are several."""
    in_stack, own = stacked(64, heads * width, 6)
    out, highest, total = (
        jnp.asarray(RNG.standard_normal((rows, 4, heads, *more)), jnp.float32) for more in ((width,), (), ())
    )
    highest = highest.at[:, 2].set(float(jnp.finfo(jnp.float32).min))
    parts = AttentionParts(out.at[:, 2].set(0.0), 3 * highest, jnp.abs(total).at[:, 2].set(0.0), "bfloat16")
    with interpreted():
        got, alone = (
            grouped_lora_linear(x, [p], scaling=2.0, implementation="few_rows")
            for x, p in ((parts, in_stack), (parts.joined(), own))
        )
    exact_parts = dataclasses.replace(parts, dtype="float32")
    assert_as_close(got, alone, grouped_lora_linear(exact_parts, [exact(own)], scaling=2.0, implementation="xla"))


def test_dropout_is_not_left_out() -> None:
    """An adapter in a stack is taken out of it where one-row kernels, which have no dropout, would not do."""
    in_stack, own = stacked(64, 192, 4)
    settings = {"scaling": 2.0, "dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    x = draw(1, 192)
    with interpreted():
        got, alone = (grouped_lora_linear(x, [p], implementation="few_rows", **settings) for p in (in_stack, own))
    np.testing.assert_array_equal(got, alone)


def test_kernels_lower_for_a_gpu() -> None:
    p, _ = stacked(64, 256, 16)
    wide, _ = stacked(64, 8192, 16)

    def step(x: jax.Array, gate_up: jax.Array, scale: jax.Array) -> tuple[jax.Array, ...]:
        y, total = norm_linear(x, StackLayer(scale, LAYER), [p, p], eps=1e-5, implementation="few_rows")
        low = grouped_lora_linear(x, [p], implementation="few_rows")
        shapes = (1, 8, 2, 128), (1, 8, 2), (1, 8, 2)
        parts = AttentionParts(*(jnp.zeros(shape) for shape in shapes), "bfloat16")
        low += grouped_lora_linear(parts, [p], implementation="few_rows")
        return y, total, low, glu_linear(gate_up, wide, implementation="few_rows")

    text = lower_for_cuda(step, draw(1, 256), draw(1, 2 * 8192), draw(LAYERS, 256))
    product = "nf4_matmul_row" if jax.__version_info__ < (0, 11) else "mosaic_gpu"
    for name in ("norm_low_row", "low_row", "join_low_row", "glu_low_row", product):
        assert name in text
