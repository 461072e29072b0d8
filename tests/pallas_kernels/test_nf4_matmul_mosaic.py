"""What needs no GPU of the product through Mosaic: its byte permutes, its order of columns, its lowering."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from ptx import run_ptx

from pallas_kernels._device import lower_for_cuda
from pallas_kernels.nf4 import quantize
from pallas_kernels.nf4.reference import NF4_TABLE
from pallas_kernels.nf4_matmul import mosaic_gpu, nf4_matmul

needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused by name, which is tested below")


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


def test_assembly_and_order_of_columns() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (64, 32), np.uint8)
    loaded = codes.reshape(-1)[places(fragmented_array.WGMMA_LAYOUT_UPCAST_2X, (64, 32))]
    out = run_ptx(mosaic_gpu._LOOKUP, np.ascontiguousarray(loaded).view(np.uint32)[..., 0])
    # Registers of the operand: tiles of 8 columns, four for one register of bytes, of two rows each.
    pairs = np.stack(out, axis=-1).reshape(128, 2, 2, 4).transpose(0, 1, 3, 2).reshape(128, 16)
    got = np.zeros(64 * 64, np.uint16)
    got[places(mgpu.WGMMA_LAYOUT, (64, 64))] = np.stack([pairs & 0xFFFF, pairs >> 16], axis=-1)
    values = NF4_TABLE[np.stack([codes >> 4, codes & 15], axis=-1).reshape(64, 64)]
    expected = mosaic_gpu._permuted(jnp.asarray(values, jnp.bfloat16))
    np.testing.assert_array_equal(got.reshape(64, 64), np.asarray(expected).view(np.uint16))


@needs_jax_0_11
@pytest.mark.parametrize(
    ("shape", "m"), [((14336, 4096), 16), ((4096, 14336), 64), ((1024, 4096), 512), ((14336, 4096), 300)]
)
def test_lowers_to_cuda(shape: tuple[int, int], m: int) -> None:
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert "mosaic_gpu" in lower_for_cuda(
        mosaic_gpu.nf4_matmul_mosaic, jax.ShapeDtypeStruct((m, shape[1]), jnp.bfloat16), w
    )


def test_refusals_say_why() -> None:
    w = quantize(jnp.ones((128, 256), jnp.bfloat16))
    reason = "needs JAX 0.11 or newer" if jax.__version_info__ < (0, 11) else "needs a Hopper GPU"
    with pytest.raises(NotImplementedError, match=reason):
        nf4_matmul(jnp.ones((16, 256), jnp.bfloat16), w, implementation="mosaic")
    if jax.__version_info__ >= (0, 11):
        for x, words in ((jnp.ones((16, 256)), "bfloat16"), (jnp.ones((513, 256), jnp.bfloat16), "1 to 512 rows")):
            with pytest.raises(NotImplementedError, match=words):
                nf4_matmul(x, w, implementation="mosaic")
