"""NF4 quantisation of a weight and back: the public functions.

Both take NumPy arrays, and then work on the host without touching a device, or JAX arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels._dispatch import choose
from pallas_kernels.nf4 import mosaic, triton, xla
from pallas_kernels.nf4.reference import encode_blocks, encode_scales, nf4_dequantize_reference
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.nf4.threads import on_all_cores

_DTYPES = ("bfloat16", "float16", "float32")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK_SIZE = 256
# Elements that the host works on at a time: its temporaries stay in the cache, and within a few MiB.
_SLAB = 1 << 17


def quantize(
    w: Float[jax.Array | np.ndarray, "*stack out in"],
    *,
    dtype: Any = None,
    double_quant: bool = True,
    block_size: int = 64,
) -> NF4Tensor:
    """Packs a weight, or a stack of them, as NF4 (arXiv:2305.14314), in bitsandbytes' bytes.

    Codes and float32 scales are those of bitsandbytes' CPU code, bit for bit (on a GPU, XLA's division may move a code
    that lies within rounding of a boundary). Double quantisation searches the nearest 8-bit scale exactly, where
    bitsandbytes approximates, so those bytes agree for nearly all blocks and are never worse.

    Args:
        w: [..., out, in], bfloat16, float16 or float32, of any size. NumPy in, NumPy out, in slabs; JAX arrays may be
            traced.
        dtype: what decoding will round to; w's own by default.
        double_quant: store the scales as 8-bit codes.
        block_size: elements per scale, a power of two from 32 to 4096.

    Raises:
        ValueError: fewer than two axes, an unknown block size or dtype, no elements, or (NumPy only) a weight that is
            not finite.
    """
    logical_dtype = _checked_dtype("quantize", w.dtype if dtype is None else dtype)
    _checked_dtype("quantize", w.dtype)
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"nf4.quantize: w has shape {w.shape}; it must be [..., out, in] and hold something")
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"nf4.quantize: block_size is {block_size}; use one of {_BLOCK_SIZES}")
    if isinstance(w, np.ndarray):
        codes, *scales = _quantize_on_host(w.reshape(*w.shape[:-2], -1), double_quant, block_size)
    else:
        codes, *scales = _quantize_on_device(w, double_quant, block_size)
    absmax, nested_absmax, offset = scales
    shape = (w.shape[-2], w.shape[-1])
    return NF4Tensor(codes, absmax, nested_absmax, offset, shape, logical_dtype, block_size, _NESTED_BLOCK_SIZE)


def dequantize(
    t: NF4Tensor, dtype: Any = None, implementation: str | None = None
) -> Float[jax.Array | np.ndarray, "*stack out in"]:
    """Decodes a packed weight: table[code] * scale in float32, rounded to t.dtype, then cast to `dtype`.

    Equals bitsandbytes' CPU code bit for bit, whatever the dtypes of weight and scales.

    Args:
        t: a weight or a stack of them. NumPy leaves are decoded on the host into NumPy, unless an implementation is
            named.
        dtype: of the result: bfloat16, float16 or float32; t.dtype by default.
        implementation: "mosaic", "triton", "xla", or None to choose.

    Raises:
        ValueError: another dtype, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    result_dtype = _checked_dtype("dequantize", t.dtype if dtype is None else dtype)
    if implementation is None and isinstance(t.codes, np.ndarray):
        return _dequantize_on_host(t, result_dtype)
    candidates = {
        "mosaic": lambda: mosaic.unsupported_reason(t, result_dtype),
        "triton": lambda: triton.unsupported_reason(t),
        "xla": lambda: xla.unsupported_reason(t),
    }
    chosen = choose("nf4.dequantize", implementation, candidates)
    if chosen == "mosaic":
        return mosaic.nf4_dequantize_mosaic(t)
    if chosen == "triton":
        return triton.nf4_dequantize_triton(t, result_dtype)
    return _dequantize_xla(t, result_dtype)


def dequantize_into(
    scratch: Float[jax.Array, "rows columns"],
    t: NF4Tensor | NF4Layer,
    *,
    row: int = 0,
    implementation: str | None = None,
) -> Float[jax.Array, "rows columns"]:
    """`scratch` with a packed weight decoded into its rows from `row` on and its first columns.

    What else `scratch` holds stays as it is: other weights below each other, or columns for an adapter. Through Triton
    it is written in place where the caller has no further use for it (an argument that `jax.jit` is told to donate, or
    a value made inside).

    Args:
        scratch: bfloat16, float16 or float32; values are rounded to t.dtype, then cast to this.
        t: one weight [out, in], on its own or in its stack, with row + out <= rows and in <= columns.
        implementation: "triton", "xla", or None to choose.

    Raises:
        ValueError: the weight does not fit, is a stack, another dtype, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    dtype = _checked_dtype("dequantize_into", scratch.dtype)
    if isinstance(t, NF4Tensor) and t.stack_shape:
        raise ValueError(f"nf4.dequantize_into: t is a stack {t.stack_shape} of weights; take one, or an NF4Layer")
    if scratch.ndim != 2 or not 0 <= row <= scratch.shape[0] - t.shape[0] or t.shape[1] > scratch.shape[1]:
        raise ValueError(
            f"nf4.dequantize_into: a weight {t.shape} at row {row} does not fit into {scratch.shape}; make it larger"
        )
    candidates = {"triton": lambda: triton.unsupported_reason(t), "xla": lambda: None}
    if choose("nf4.dequantize_into", implementation, candidates) == "triton":
        rows, columns = scratch.shape
        return triton.decode_into(scratch, t, dtype, rows=rows, columns=columns, first_row=row)
    weight = _dequantize_xla(t.picked() if isinstance(t, NF4Layer) else t, dtype)
    return jax.lax.dynamic_update_slice(scratch, weight, (row, 0))


def _checked_dtype(function: str, dtype: Any) -> str:
    name = np.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"nf4.{function}: dtype {name} is not supported; use one of {', '.join(_DTYPES)}")
    return name


@functools.partial(jax.jit, static_argnames=("double_quant", "block_size"))
def _quantize_on_device(w: jax.Array, double_quant: bool, block_size: int) -> tuple[Any, ...]:
    codes, absmax = encode_blocks(w.reshape(*w.shape[:-2], -1), block_size)
    if not double_quant:
        return codes, absmax, None, None
    offset = jnp.mean(absmax, axis=-1)
    return codes, *encode_scales(absmax, offset, _NESTED_BLOCK_SIZE), offset


# Compiled also when called outside of jit: operation by operation, each step would be an array of the weight's size.
_dequantize_xla = jax.jit(xla.nf4_dequantize_xla, static_argnames="dtype")


def _slabs(count: int, multiple: int) -> list[slice]:
    """Cuts `count` elements into slices of about `_SLAB`, each but the last a multiple of `multiple`."""
    step = max(_SLAB // multiple, 1) * multiple
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _quantize_on_host(flat: np.ndarray, double_quant: bool, block_size: int) -> tuple[Any, ...]:
    *stack, count = flat.shape
    blocks = -(-count // block_size)
    codes = np.empty((*stack, -(-count // 2)), np.uint8)
    absmax = np.empty((*stack, blocks), np.float32)
    for index in np.ndindex(*stack):

        def encode(part: slice, index: tuple[int, ...] = index) -> None:
            with np.errstate(invalid="ignore"):  # infinities are reported below
                encoded = encode_blocks(flat[index][part], block_size)
            _put(codes[index], encoded[0], part.start // 2)
            _put(absmax[index], encoded[1], part.start // block_size)

        on_all_cores(encode, _slabs(count, block_size))
    if not np.isfinite(absmax).all():
        raise ValueError("nf4.quantize: the weight holds NaN or infinity, which no scale can hold; repair the weight")
    if not double_quant:
        return codes, absmax, None, None
    offset = np.asarray(np.mean(absmax, axis=-1, dtype=np.float32))
    scale_codes = np.empty(absmax.shape, np.uint8)
    nested_absmax = np.empty((*stack, -(-blocks // _NESTED_BLOCK_SIZE)), np.float32)
    for index in np.ndindex(*stack):

        def encode_again(part: slice, index: tuple[int, ...] = index) -> None:
            encoded = encode_scales(absmax[index][part], offset[index], _NESTED_BLOCK_SIZE)
            _put(scale_codes[index], encoded[0], part.start)
            _put(nested_absmax[index], encoded[1], part.start // _NESTED_BLOCK_SIZE)

        on_all_cores(encode_again, _slabs(blocks, _NESTED_BLOCK_SIZE))
    return codes, scale_codes, nested_absmax, offset


def _put(array: np.ndarray, values: np.ndarray, start: int) -> None:
    """Writes `values` into the flat `array` from `start` on."""
    array[start : start + values.size] = values


def _dequantize_on_host(t: NF4Tensor, dtype: str) -> np.ndarray:
    count = t.shape[0] * t.shape[1]
    weights = np.empty((*t.stack_shape, count), dtype)
    for index in np.ndindex(*t.stack_shape):
        one = jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), t)

        def decode(part: slice, one: NF4Tensor = one, flat: np.ndarray = weights[index]) -> None:
            flat[part] = nf4_dequantize_reference(_cut(one, part), dtype)[0]

        on_all_cores(decode, _slabs(count, t.block_size * (t.nested_block_size if t.is_nested else 1)))
    return weights.reshape(*t.stack_shape, *t.shape)


def _cut(t: NF4Tensor, part: slice) -> NF4Tensor:
    """The elements `part` of one flat weight, as a weight of one row; `part` starts at a nested block."""
    count = part.stop - part.start
    nested_size = t.block_size * t.nested_block_size

    def cut(array: np.ndarray, elements: int) -> np.ndarray:
        return array[part.start // elements :][: -(-count // elements)]

    return dataclasses.replace(
        t,
        codes=cut(t.codes, 2),
        absmax=cut(t.absmax, t.block_size),
        nested_absmax=cut(t.nested_absmax, nested_size) if t.is_nested else None,
        shape=(1, count),
    )
