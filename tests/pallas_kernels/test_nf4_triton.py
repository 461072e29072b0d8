"""The Triton decoding of NF4 against the reference, bit for bit, alone and into part of a larger array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import compute_capability, lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.nf4 import NF4Layer, dequantize, quantize
from pallas_kernels.nf4.triton import decode_into, unsupported_reason

CASES = {
    "SmolLM2's rows": ((64, 576), "bfloat16", True, 64),
    "float32 scales": ((192, 256), "float32", False, 64),
    "fp16": ((48, 1536), "float16", True, 64),
    "blocks of 128, rows that no tile divides": ((10, 128), "bfloat16", True, 128),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_bits(case: str, dtype: str) -> None:
    (n, k), stored, double_quant, block = CASES[case]
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, n, k)), jnp.float32)
    stack = quantize(w, dtype=stored, double_quant=double_quant, block_size=block)
    expected = np.asarray(dequantize(stack, dtype, implementation="xla"))
    layer = NF4Layer(stack, jnp.int32(2))
    alone = jax.tree.map(lambda leaf: leaf[1], stack)
    with interpreted():
        whole = decode_into(None, alone, dtype, rows=n, columns=k)
        part = decode_into(jnp.ones((2 * n, k + 64), dtype), layer, dtype, rows=2 * n, columns=k + 64, first_row=n)
    np.testing.assert_array_equal(np.asarray(whole).view(np.uint8), expected[1].view(np.uint8))
    part = np.asarray(part)
    np.testing.assert_array_equal(part[n:, :k], expected[2])
    assert (part[:n].astype(np.float32) == 1).all()
    assert (part[n:, k:].astype(np.float32) == 1).all()


def test_lowers_to_cuda_and_writes_in_place() -> None:
    stack = quantize(jnp.asarray(np.random.default_rng(1).standard_normal((2, 1024, 512)), jnp.float32))
    scratch = jax.ShapeDtypeStruct((1024, 640), jnp.bfloat16)

    def decode(scratch: jax.Array, stack: object, index: jax.Array) -> jax.Array:
        return decode_into(scratch, NF4Layer(stack, index), jnp.bfloat16, rows=1024, columns=640)

    assert "output_operand_aliases" in lower_for_cuda(decode, scratch, stack, jnp.int32(0), donate=(0,))


def test_reasons() -> None:
    odd = quantize(jnp.ones((8, 96)))
    assert "96" in (unsupported_reason(odd) or "")
    stack = quantize(jnp.ones((2, 8, 128)))
    assert "stack" in (unsupported_reason(stack) or "")
    if compute_capability() is None:
        assert unsupported_reason(NF4Layer(stack, jnp.int32(0))) == "it needs an NVIDIA GPU"
