"""Products of few rows through PTX: the program itself, interpreted, against the definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx import launched

from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.nf4 import NF4Layer, dequantize, quantize
from pallas_kernels.nf4_matmul import mosaic_few
from pallas_kernels.nf4_matmul.fused import fused_group

needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused by name, which is tested below")
# rows, columns, rows of the weights, ranks of their adapters, options: one round of columns and several, the last of
# which is not for all warps; tiles that blocks of threads share unevenly; ranks that no sixteen divides.
CASES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one row": (1, 1024, (80,), (0,), {}),
    "one row, its low rank in parts": (1, 2560, (48,), (6,), {"wide": True, "parts": 3}),
    "one row, parts for several weights": (1, 1024, (32, 16), (70, 4), {"wide": True, "parts": 2}),
    "q, k, v of a layer": (3, 1024, (32, 16, 48), (8, 0, 70), {"stacked": True}),
    "two groups of rows, float32 result": (16, 1536, (64,), (16,), {"dtype": "float32"}),
    "float32 scales and adapters": (11, 2560, (32, 32), (4, 4), {"nested": False, "wide": True, "stacked": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_values(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    m, k, sizes, ranks, options = CASES[name]
    monkeypatch.setattr(mosaic_few, "launch", launched)
    monkeypatch.setattr(mosaic_few, "multiprocessors", lambda: 2)
    monkeypatch.setattr(mosaic_few, "_MOST_WARPS", 4)
    rng = np.random.default_rng(0)
    adapter_dtype = "float32" if options.get("wide") else "bfloat16"
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
    weights, ups, lows, exact, own = [], [], [], [], []
    for n, rank in zip(sizes, ranks, strict=True):
        stack = quantize(
            rng.standard_normal((2, n, k), np.float32) * np.float32(k**-0.5),
            dtype="bfloat16",
            double_quant=options.get("nested", True),
        )
        one = jax.tree.map(lambda leaf: leaf[1], stack)
        weights.append(NF4Layer(stack, np.int32(1)) if options.get("stacked") else one)
        up, low = (rng.standard_normal(shape).astype(adapter_dtype) for shape in ((n, rank), (m, rank)))
        ups.append(jnp.asarray(up) if rank else None)
        lows.append(low)
        adapter = low.astype("bfloat16").astype(np.float32) @ up.astype("bfloat16").astype(np.float32).T
        values = np.asarray(dequantize(dataclasses.replace(one, dtype="float32")))
        # The definition rounds the weight, then the result.
        exact.append(np.asarray(x, np.float32) @ values.T + adapter)
        own.append(np.asarray(x, np.float32) @ values.astype("bfloat16").astype(np.float32).T + adapter)
    low = jnp.pad(jnp.concatenate(lows, axis=1), ((0, 0), (0, 2)))
    if (parts := options.get("parts", 1)) > 1:
        some = jnp.asarray(rng.standard_normal((parts - 1, low.shape[1])), jnp.float32)
        low = jnp.concatenate([some, low - jnp.sum(some, axis=0, keepdims=True)])
    got = mosaic_few.few_rows(x, weights, ups, low, options.get("dtype"))
    assert got.dtype == options.get("dtype", "bfloat16")
    true, theirs = np.concatenate(exact, axis=1), np.concatenate(own, axis=1).astype("bfloat16").astype(np.float32)
    error = np.linalg.norm(np.asarray(got, np.float32) - true)
    assert error <= 1.5 * np.linalg.norm(theirs - true)


@pytest.mark.parametrize("m", [1, 4])
def test_a_group_is_the_same_through_mosaic_and_triton(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    rng = np.random.default_rng(1)
    weights = [quantize(jnp.asarray(rng.standard_normal((n, 512)) / 512**0.5, jnp.bfloat16)) for n in (32, 16)]
    x, low = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((m, 512), (m, 4)))
    ups = [None, jnp.asarray(rng.standard_normal((16, 4)), jnp.bfloat16)]
    with interpreted():
        through_triton = fused_group(x, weights, ups, low)
    monkeypatch.setattr(mosaic_few, "launch", launched)
    monkeypatch.setattr(mosaic_few, "hopper_reason", lambda: None)
    through_mosaic = fused_group(x, weights, ups, low)
    assert isinstance(through_mosaic, np.ndarray)
    # Both round a table and their results to bfloat16, Triton with several rows a scale and a sum, too.
    error = np.linalg.norm(np.asarray(through_triton, np.float32) - through_mosaic.astype(np.float32))
    assert error <= 2 * 2.0**-8 * np.linalg.norm(through_mosaic.astype(np.float32))


@needs_jax_0_11
@pytest.mark.parametrize(
    ("m", "sizes", "k"), [(1, (14336, 14336), 4096), (8, (4096,), 14336), (16, (4096, 1024, 1024), 4096)]
)
def test_lowers_to_cuda(m: int, sizes: tuple[int, ...], k: int) -> None:
    shape = jax.ShapeDtypeStruct
    stacks = [jax.eval_shape(quantize, shape((4, n, k), jnp.bfloat16)) for n in sizes]
    ups = [shape((n, 64), jnp.float32) for n in sizes]

    def product(x: jax.Array, stacks: Any, ups: Any, low: jax.Array, index: jax.Array) -> jax.Array:
        return mosaic_few.few_rows(x, [NF4Layer(stack, index) for stack in stacks], ups, low)

    low = shape((m, 64 * len(sizes)), jnp.float32)
    text = lower_for_cuda(product, shape((m, k), jnp.bfloat16), stacks, ups, low, shape((), jnp.int32))
    assert "mosaic_gpu" in text


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = jax.ShapeDtypeStruct
    x, w = shape((4, 512), jnp.bfloat16), jax.eval_shape(quantize, shape((32, 512), jnp.bfloat16))
    needs = "needs JAX 0.11 or newer" if jax.__version_info__ < (0, 11) else "needs a Hopper GPU"
    assert needs in (mosaic_few.unsupported_reason(x, [w]) or "")
    monkeypatch.setattr(mosaic_few, "hopper_reason", lambda: None)
    assert mosaic_few.unsupported_reason(x, [w], [shape((32, 8), jnp.bfloat16)]) is None
    single = jax.eval_shape(lambda v: quantize(v, double_quant=False), shape((32, 512), jnp.bfloat16))
    narrow, wide = (jax.eval_shape(quantize, shape((32, k), jnp.bfloat16)) for k in (128, 4352))
    refused = {
        "1 to 16 rows of 512 columns, not 17": (shape((17, 512), jnp.bfloat16), [w], None),
        "1 to 8 rows of 4352 columns, not 9": (shape((9, 4352), jnp.bfloat16), [wide], None),
        "x is float32": (shape((4, 512), jnp.float32), [w], None),
        "do not divide a weight (32, 128)": (shape((4, 128), jnp.bfloat16), [narrow], None),
        "others are not": (x, [w, single], None),
        "the rank of one is odd": (x, [w], [shape((32, 7), jnp.bfloat16)]),
        "adapters of one dtype": (x, [w, w], [shape((32, 8), jnp.bfloat16), shape((32, 8), jnp.float32)]),
    }
    for words, arguments in refused.items():
        assert words in (mosaic_few.unsupported_reason(*arguments) or "")
