"""NF4 against bitsandbytes' CPU code, bit for bit wherever bitsandbytes is deterministic."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from pallas_kernels.nf4 import DYNAMIC_MAP, NF4_TABLE, NF4Tensor, dequantize, quantize
from pallas_kernels.nf4.reference import decode_scales

DTYPES = ("bfloat16", "float16", "float32")
# Whole blocks in a row; blocks that cross rows; odd rows; an odd count; less than one block; several nested blocks.
SHAPES = [(4, 128), (7, 96), (8, 32), (6, 33), (5, 77), (3, 9), (1, 1), (130, 257), (300, 256)]


@pytest.fixture(autouse=True)
def _without_compiler():
    # Its generic code is compiled anew for each shape otherwise.
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def draw(shape, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers; bfloat16 by way of float32."""
    return tensor.float().numpy().astype(str(tensor.dtype).removeprefix("torch."))


def theirs(w: torch.Tensor, double_quant: bool, block_size: int = 64):
    return bnb.quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


def as_nf4(codes: torch.Tensor, state: bnb.QuantState, shape: tuple[int, int]) -> NF4Tensor:
    nested = state.state2
    return NF4Tensor(
        codes=codes.numpy().reshape(-1),
        absmax=state.absmax.numpy(),
        nested_absmax=nested.absmax.numpy() if nested else None,
        nested_offset=state.offset.numpy() if nested else None,
        shape=shape,
        dtype=str(state.dtype).removeprefix("torch."),
        block_size=state.blocksize,
        nested_dtype=str(nested.dtype).removeprefix("torch.") if nested else "float32",
    )


def test_tables():
    np.testing.assert_array_equal(NF4_TABLE, bnb.get_4bit_type("nf4", "cpu").numpy())
    # The last bit of torch's linspace depends on the processor's instruction set.
    np.testing.assert_allclose(DYNAMIC_MAP, bnb.create_dynamic_map().numpy(), rtol=2.0**-22)


@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_theirs(shape, dtype, block_size):
    w = draw(shape, dtype)
    w.view(-1)[100:300] = 0
    codes, state = theirs(w, double_quant=False, block_size=block_size)
    t = quantize(as_numpy(w), double_quant=False, block_size=block_size)
    np.testing.assert_array_equal(t.codes, codes.numpy().reshape(-1))
    np.testing.assert_array_equal(t.absmax, state.absmax.numpy())
    on_device = quantize(jax.numpy.asarray(as_numpy(w)), double_quant=False, block_size=block_size)
    np.testing.assert_array_equal(on_device.codes, t.codes)


def test_values_on_the_boundaries_between_codes():
    midpoints = torch.from_numpy((NF4_TABLE[1:] + NF4_TABLE[:-1]) / 2)
    around = torch.cat(
        [midpoints, torch.nextafter(midpoints, midpoints * 2), torch.nextafter(midpoints, midpoints * 0)]
    )
    for scale in (1.0, 0.3, 1e-3, 7.7, 2.0**-126):
        w = torch.cat([torch.ones(1), around, torch.zeros(18)]).reshape(1, 64) * scale
        # A second, short block is divided where the first is multiplied.
        w = torch.cat([w, w[:, :48]], dim=1)
        codes, _ = theirs(w, double_quant=False)
        np.testing.assert_array_equal(quantize(w.numpy(), double_quant=False).codes, codes.numpy().reshape(-1))


def test_zeros():
    for shape in ((2, 64), (3, 33)):
        codes, state = theirs(torch.zeros(shape), double_quant=False)
        t = quantize(np.zeros(shape, np.float32), double_quant=False)
        np.testing.assert_array_equal(t.codes, codes.numpy().reshape(-1))
        np.testing.assert_array_equal(t.absmax, state.absmax.numpy())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_theirs(shape, dtype, double_quant):
    codes, state = theirs(draw(shape, dtype), double_quant)
    # Their AVX-512 loop gives blocks that cross rows wrong scales; their other code does not, nor does it in one row.
    state.shape = torch.Size((1, shape[0] * shape[1]))
    for nested_dtype in DTYPES if double_quant else ("float32",):
        if double_quant:
            state.state2.dtype = getattr(torch, nested_dtype)
        t = as_nf4(codes, state, shape)
        decoded = as_numpy(bnb.dequantize_4bit(codes, state)).reshape(shape)
        for implementation in (None, "xla"):
            ours = np.asarray(dequantize(t, implementation=implementation))
            assert ours.dtype == decoded.dtype
            np.testing.assert_array_equal(ours, decoded)


def test_nested_scales_are_theirs_within_a_few_steps_and_never_worse():
    w = draw((512, 1024))
    true = quantize(w.numpy(), double_quant=False).absmax
    _, state = theirs(w, double_quant=True)
    t = quantize(w.numpy())
    assert float(t.nested_offset) == pytest.approx(state.offset.item(), rel=1e-6)
    np.testing.assert_allclose(t.nested_absmax, state.state2.absmax.numpy(), rtol=1e-5)

    steps = np.abs(t.absmax.astype(int) - state.absmax.numpy())
    assert (steps > 0).mean() < 0.01
    assert steps.max() <= 4
    our_error = np.abs(decode_scales(t).astype(np.float64) - true)
    their_scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    their_error = np.abs(their_scales.numpy().astype(np.float64) - true)
    # The two means, and each decoded scale, are rounded to float32.
    assert (our_error <= their_error + 4 * 2.0**-24 * true).all()


def test_their_decoder_reads_our_tensors():
    for dtype in DTYPES:
        w = draw((64, 192), dtype)
        t = quantize(as_numpy(w))
        state = bnb.QuantState(
            absmax=torch.from_numpy(t.absmax),
            shape=torch.Size(t.shape),
            code=torch.from_numpy(NF4_TABLE.copy()),
            blocksize=64,
            quant_type="nf4",
            dtype=w.dtype,
            offset=torch.tensor(float(t.nested_offset)),
            state2=bnb.QuantState(
                absmax=torch.from_numpy(t.nested_absmax),
                blocksize=256,
                code=torch.from_numpy(DYNAMIC_MAP.copy()),
                dtype=torch.float32,
            ),
        )
        decoded = bnb.dequantize_4bit(torch.from_numpy(t.codes).reshape(-1, 1), state)
        np.testing.assert_array_equal(dequantize(t), as_numpy(decoded))
