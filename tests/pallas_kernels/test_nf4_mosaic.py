"""Decoding NF4 through PTX: the program itself, interpreted, bit for bit the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx import launched

from pallas_kernels._device import lower_for_cuda
from pallas_kernels.nf4 import dequantize, mosaic, quantize

needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused by name, which is tested below")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bits(monkeypatch: pytest.MonkeyPatch, dtype: str, double_quant: bool) -> None:
    monkeypatch.setattr(mosaic, "launch", launched)
    w = np.random.default_rng(0).standard_normal((128, 192), np.float32)
    t = quantize(w, dtype=dtype, double_quant=double_quant)
    got = np.asarray(mosaic.nf4_dequantize_mosaic(t))
    np.testing.assert_array_equal(got.view(np.uint16), np.asarray(dequantize(t)).view(np.uint16))


@needs_jax_0_11
def test_lowers_to_cuda() -> None:
    t = jax.eval_shape(quantize, jax.ShapeDtypeStruct((14336, 4096), jnp.bfloat16))
    assert "mosaic_gpu" in lower_for_cuda(lambda t: dequantize(t, implementation="mosaic"), t)


def test_reasons() -> None:
    t = quantize(jnp.ones((64, 128), jnp.bfloat16))
    needs = "needs JAX 0.11 or newer" if jax.__version_info__ < (0, 11) else "needs a Hopper GPU"
    refused = [
        ("to float32", t, "float32"),
        ("stack", quantize(jnp.ones((2, 64, 128))), "float32"),
        (needs, t, "bfloat16"),
    ]
    refused += [("4096 elements at a time", quantize(jnp.ones((8, 64), jnp.bfloat16)), "bfloat16")]
    for words, weight, dtype in refused:
        assert words in (mosaic.unsupported_reason(weight, dtype) or "")
