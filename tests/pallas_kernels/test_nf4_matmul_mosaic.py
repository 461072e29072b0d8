"""What needs no GPU of the product through Mosaic: what its assembly makes of bytes, its layout, its lowering."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from ptx import Machine

from pallas_kernels._device import assume_capability, lower_for_cuda
from pallas_kernels._dispatch import record_choices
from pallas_kernels.nf4 import NF4Layer, quantize
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE, decode_scales
from pallas_kernels.nf4_matmul import mosaic_gpu, nf4_matmul
from pallas_kernels.nf4_matmul.mosaic_few import pairs
from pallas_kernels.nf4_matmul.tile_assembly import scales_pitch, scales_text, weights_text

needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused by name, which is tested below")
TABLE_BYTES = 256 * 32 * 4


def places(layout: fragmented_array.TiledLayout, shape: tuple[int, int]) -> np.ndarray:
    """[128 threads, registers, elements of a register]: which element of an array of this shape lies there."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead = index.ndim - len(tile)
        cut = [n for d, t in zip(index.shape[lead:], tile, strict=True) for n in (d // t, t)]
        index = index.reshape(*index.shape[:lead], *cut)
        axes = [lead + 2 * i + j for j in (0, 1) for i in range(len(tile))]
        index = index.transpose(*range(lead), *axes)
    threads = [d % index.ndim for d in (*layout.warp_dims, *layout.lane_dims)]
    rest = [d for d in range(index.ndim - 1) if d not in threads]
    return index.transpose(*threads, *rest, index.ndim - 1).reshape(128, -1, index.shape[-1])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("first", "blocks", "row_bytes"), [(4, 4, 64), (1, 7, 32)])
def test_tile_of_weights(nested: bool, first: int, blocks: int, row_bytes: int) -> None:
    """Rows 128 to 191 of a weight of 256, blocks from `first` on, of which one is decoded into wgmma's registers."""
    n, k, row, block = 256, 512, 128, 2
    rng = np.random.default_rng(0)
    t = quantize(rng.standard_normal((n, k), np.float32), dtype="bfloat16", double_quant=nested)
    codes = t.codes.reshape(n, k // 2)[row : row + 64, (first + block) * 32 :][:, :32]
    scales_at, pitch = TABLE_BYTES, 4 * scales_pitch(blocks)
    codes_at = scales_at + 32 * pitch
    scale_arrays = [DYNAMIC_MAP, t.nested_absmax, t.nested_offset] if nested else []
    machine = Machine([t.absmax, *scale_arrays], codes_at + 64 * row_bytes)
    machine.shared[:TABLE_BYTES] = np.repeat(pairs()[:, None], 32, axis=1).view(np.uint8).ravel()
    machine.shared[codes_at:].reshape(64, row_bytes)[:, :32] = codes
    absmax_at, *others = machine.addresses
    here = absmax_at + (row * (k // 64) + first) * t.absmax.itemsize
    machine.run(scales_text(blocks, k // 64, nested), [scales_at, here, absmax_at, *others], threads=128)
    operands = [0] * 16 + [codes_at, 0, scales_at + 4 * block]
    registers = machine.run(weights_text(row_bytes, pitch), operands, threads=128)
    # The order in which mosaic_gpu gives them to the layout: tiles of 8 columns, of two rows each.
    words = np.stack([registers[f"${i % 2 * 8 + i // 2}"] for i in range(16)], axis=-1)
    got = np.zeros(64 * 64, np.uint16)
    got[places(mgpu.WGMMA_LAYOUT, (64, 64))] = np.stack([words & 0xFFFF, words >> 16], axis=-1)
    values = NF4_TABLE[np.stack([codes >> 4, codes & 15], axis=-1).reshape(64, 64)].astype("bfloat16")
    scales = decode_scales(t).reshape(n, -1)[row : row + 64, first + block].astype("bfloat16")
    expected = (values.astype(np.float32) * scales.astype(np.float32)[:, None]).astype("bfloat16")
    np.testing.assert_array_equal(got.reshape(64, 64), expected.view(np.uint16))


@needs_jax_0_11
@pytest.mark.parametrize(
    ("shape", "m"), [((14336, 4096), 16), ((4096, 14336), 64), ((1024, 4096), 512), ((14336, 4096), 300)]
)
def test_lowers_to_cuda(shape: tuple[int, int], m: int) -> None:
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16))
    x, index = jax.ShapeDtypeStruct((m, shape[1]), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)
    product = lower_for_cuda(lambda x, w, i: mosaic_gpu.nf4_matmul_mosaic(x, NF4Layer(w, i)), x, w, index)
    assert "mosaic_gpu" in product


@pytest.mark.parametrize("rows", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (1024, 2560), (28672, 8192)])
def test_tiles_fit_and_fill(rows: int, shape: tuple[int, int]) -> None:
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    tiles = mosaic_gpu.tiles_for(rows, w)
    assert shape[1] % (tiles.columns * tiles.split) == 0
    assert tiles.steps >= 2


@needs_jax_0_11
@pytest.mark.parametrize(
    ("rows", "tall", "flat"),
    [(16, "mosaic", "mosaic"), (64, "mosaic", "mosaic"), (65, "mosaic", "triton"), (513, "triton", "triton")],
)
def test_choice(rows: int, tall: str, flat: str) -> None:
    """What was the fastest on an H200."""
    for (n, k), wanted in (((14336, 4096), tall), ((4096, 14336), flat), ((4096, 4096), flat)):
        w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((n, k), jnp.bfloat16))
        with assume_capability(9.0), record_choices("xla") as choices:
            jax.eval_shape(nf4_matmul, jax.ShapeDtypeStruct((rows, k), jnp.bfloat16), w)
        assert choices[0].implementation == wanted


def test_refusals_say_why() -> None:
    w = quantize(jnp.ones((128, 256), jnp.bfloat16))
    reason = "needs JAX 0.11 or newer" if jax.__version_info__ < (0, 11) else "needs a Hopper GPU"
    with pytest.raises(NotImplementedError, match=reason):
        nf4_matmul(jnp.ones((16, 256), jnp.bfloat16), w, implementation="mosaic")


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mosaic_gpu, mosaic_gpu.mosaic_few):
        monkeypatch.setattr(module, "hopper_reason", lambda: None)
    shape = jax.ShapeDtypeStruct
    w = jax.eval_shape(quantize, shape((128, 256), jnp.bfloat16))
    assert mosaic_gpu.unsupported_reason(shape((2, 256, 256), jnp.bfloat16), w) is None
    narrow = jax.eval_shape(quantize, shape((96, 256), jnp.bfloat16))
    assert mosaic_gpu.unsupported_reason(shape((8, 256), jnp.bfloat16), narrow) is None
    refused = {
        "computes in bfloat16": (shape((16, 256), jnp.float32), w),
        "1 to 512 rows, not 513": (shape((513, 256), jnp.bfloat16), w),
        "do not divide a weight (96, 256)": (shape((17, 256), jnp.bfloat16), narrow),
    }
    for words, arguments in refused.items():
        assert words in (mosaic_gpu.unsupported_reason(*arguments) or "")
