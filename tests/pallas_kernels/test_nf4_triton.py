"""The Triton decoding of NF4 against the reference, bit for bit, alone and into part of a larger array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import compute_capability, lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.nf4 import NF4Layer, dequantize, dequantize_into, quantize
from pallas_kernels.nf4.tensor import as_layer
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


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_into_a_callers_scratch(implementation: str) -> None:
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, 24, 192)), jnp.bfloat16)
    stack = quantize(weights)
    alone = quantize(weights[0])
    with interpreted():
        both = dequantize_into(jnp.full((60, 200), 7, jnp.float16), alone, implementation=implementation)
        both = dequantize_into(both, NF4Layer(stack, jnp.int32(1)), row=30, implementation=implementation)
    expected = np.full((60, 200), 7, np.float16)
    expected[:24, :192], expected[30:54, :192] = dequantize(stack, jnp.float16, implementation="xla")
    np.testing.assert_array_equal(both, expected)


def test_what_does_not_fit_into_a_scratch_is_refused() -> None:
    alone = quantize(jnp.ones((24, 192)))
    for shape, row in (((24, 191), 0), ((40, 192), 17), ((40, 192), -1)):
        with pytest.raises(ValueError, match="does not fit into"):
            dequantize_into(jnp.zeros(shape), alone, row=row)
    with pytest.raises(ValueError, match=r"a stack \(2,\) of weights; take one, or an NF4Layer"):
        dequantize_into(jnp.zeros((24, 192)), quantize(jnp.ones((2, 24, 192))))
    with pytest.raises(ValueError, match="dtype int8 is not supported"):
        dequantize_into(jnp.zeros((24, 192), jnp.int8), alone)


def test_lowers_to_cuda_and_writes_in_place() -> None:
    stack = quantize(jnp.asarray(np.random.default_rng(1).standard_normal((2, 1024, 512)), jnp.float32))
    scratch = jax.ShapeDtypeStruct((1024, 640), jnp.bfloat16)

    def decode(scratch: jax.Array, stack: object, index: jax.Array) -> jax.Array:
        return dequantize_into(scratch, NF4Layer(stack, index))

    assert "output_operand_aliases" in lower_for_cuda(decode, scratch, stack, jnp.int32(0), donate=(0,))


def test_reasons() -> None:
    odd = quantize(jnp.ones((8, 96)))
    assert "96" in (unsupported_reason(odd) or "")
    stack = quantize(jnp.ones((2, 8, 128)))
    assert "stack" in (unsupported_reason(stack) or "")
    if compute_capability() is None:
        assert unsupported_reason(NF4Layer(stack, jnp.int32(0))) == "it needs an NVIDIA GPU"


@pytest.mark.parametrize(("layers", "copied"), [(64, False), (80, True), (160, False)])
def test_stacks_beyond_signed_offsets_are_read_by_the_weight(layers: int, copied: bool) -> None:
    """80 weights of 8192 x 8192 take 2.7 GB of codes, which offsets of 32 bits with a sign do not reach."""
    stack = jax.eval_shape(lambda: quantize(jnp.zeros((layers, 8192, 8192), jnp.bfloat16)))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    read = jax.eval_shape(lambda stack, index: as_layer(NF4Layer(stack, index)), stack, index)
    assert read.stack.codes.shape[0] == (1 if copied else layers)
