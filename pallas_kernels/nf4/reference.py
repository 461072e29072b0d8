"""What NF4's bytes mean: encoding and decoding, written once for NumPy and for JAX.

Every function takes arrays of either kind and answers in the same kind; leading axes are stacked weights. Format: QLoRA
(arXiv:2305.14314, section 3) in bitsandbytes' bytes. Rounding follows bitsandbytes' CPU code to the bit; where an
expression looks odd, that is why.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4.tensor import NF4Tensor

# Quantiles of the normal distribution, scaled to [-1, 1] and holding an exact zero (arXiv:2305.14314, appendix E).
NF4_TABLE = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)
NF4_MIDPOINTS = (NF4_TABLE[1:] + NF4_TABLE[:-1]) / 2
# Both values of a byte, [256, 2]: the high nibble is the even element.
NF4_PAIRS = np.stack([NF4_TABLE[np.arange(256) >> 4], NF4_TABLE[np.arange(256) & 15]], axis=-1)

# What a block of zeros is divided by. bitsandbytes' own bound is subnormal, which XLA may flush to zero.
_SMALLEST_SCALE = np.float32(1e-38)
_SMALLEST_SCALE_XLA = np.finfo(np.float32).tiny


def _dynamic_map() -> np.ndarray:
    """The signed dynamic 8-bit map (arXiv:1511.04561): seven decades, each cut twice as fine as the one below."""
    positive = []
    for exponent in range(7):
        cells = 2**exponent
        index = np.arange(cells + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(cells))
        # Each half of the line is counted from its own end and rounded once, as torch.linspace does.
        from_below = (np.float64(np.float32(0.1)) + step * index).astype(np.float32)
        from_above = (1 - step * (cells - index)).astype(np.float32)
        edges = np.where(index < (cells + 1) // 2, from_below, from_above)
        positive.append(np.float32(10.0 ** (exponent - 6)) * ((edges[1:] + edges[:-1]) / 2))
    values = np.concatenate(positive)
    return np.sort(np.concatenate([values, -values, np.array([0, 1], np.float32)]))


DYNAMIC_MAP = _dynamic_map()
_DYNAMIC_MIDPOINTS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2


def _namespace(array: Any) -> ModuleType:
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def _in_blocks(flat: Any, block_size: int) -> Any:
    """[..., n] -> float32 [..., ceil(n / block_size), block_size], filled up with zeros."""
    xp = _namespace(flat)
    missing = -flat.shape[-1] % block_size
    flat = flat.astype(np.float32)
    if missing:
        flat = xp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, missing)])
    return flat.reshape(*flat.shape[:-1], -1, block_size)


def _per_element(scales: Any, block_size: int, count: int) -> Any:
    """[..., blocks] -> [..., count]: the scale of each element."""
    return _namespace(scales).repeat(scales, block_size, axis=-1)[..., :count]


def encode_blocks(flat: Any, block_size: int) -> tuple[Any, Any]:
    """Cuts [..., n] into blocks: uint8 codes [..., ceil(n / 2)] and float32 absmax [..., ceil(n / block_size)]."""
    xp = _namespace(flat)
    count = flat.shape[-1]
    x = _in_blocks(flat, block_size)
    absmax = xp.max(xp.abs(x), axis=-1)
    divisor = xp.maximum(absmax, _SMALLEST_SCALE if xp is np else _SMALLEST_SCALE_XLA)
    scaled = x * (1 / divisor)[..., None]
    if count % block_size:
        # A short last block is divided, not multiplied by a reciprocal, and its scale keeps the lower bound.
        is_last = np.arange(x.shape[-2]) == x.shape[-2] - 1
        scaled = xp.where(is_last[:, None], x / divisor[..., None], scaled)
        absmax = xp.where(is_last, divisor, absmax)
    codes = xp.zeros(scaled.shape, np.uint8)
    for midpoint in NF4_MIDPOINTS:
        codes = codes + (scaled > midpoint)
    # An odd element is paired with the code of zero, which the filling already has.
    codes = codes.reshape(*flat.shape[:-1], -1)[..., : count + count % 2]
    return (codes[..., 0::2] << 4) | codes[..., 1::2], absmax


def encode_scales(absmax: Any, offset: Any, nested_block_size: int) -> tuple[Any, Any]:
    """Double quantisation of [..., blocks] about their mean [...]: uint8 codes, float32 [..., nested blocks]."""
    xp = _namespace(absmax)
    x = _in_blocks(absmax - offset[..., None], nested_block_size)
    nested_absmax = xp.max(xp.abs(x), axis=-1)
    scaled = x / xp.maximum(nested_absmax, _SMALLEST_SCALE_XLA)[..., None]
    codes = xp.searchsorted(_DYNAMIC_MIDPOINTS, scaled).astype(np.uint8)
    return codes.reshape(*absmax.shape[:-1], -1)[..., : absmax.shape[-1]], nested_absmax


def decode_scales(t: NF4Tensor) -> Any:
    """The scale of each block, float32 [..., blocks]."""
    if not t.is_nested:
        return t.absmax
    xp = _namespace(t.absmax)
    nested = _per_element(t.nested_absmax, t.nested_block_size, t.absmax.shape[-1])
    product = xp.take(DYNAMIC_MAP, t.absmax, axis=0) * nested
    # Changes no finite value, but keeps the compiler from contracting product and sum into one FMA: the format
    # rounds in between.
    product = xp.maximum(product, np.finfo(np.float32).min)
    product, offset = round_to(product, t.nested_dtype), round_to(t.nested_offset, t.nested_dtype)
    return round_to(product + offset[..., None], t.nested_dtype)


def nf4_dequantize_reference(t: NF4Tensor, dtype: str) -> Any:
    """Decodes t into [*stack, out, in] of `dtype`, rounding to t.dtype on the way."""
    rows, columns = t.shape
    values = _namespace(t.codes).take(NF4_PAIRS, t.codes, axis=0)
    return scale_values(values.reshape(*t.stack_shape, -1), t, dtype).reshape(*t.stack_shape, rows, columns)


def scale_values(values: Any, t: NF4Tensor, dtype: str) -> Any:
    """Multiplies table values [..., 2 * bytes] of t by their scales in float32: [..., out * in] of `dtype`."""
    count = t.shape[0] * t.shape[1]
    values = values[..., :count] * _per_element(decode_scales(t), t.block_size, count)
    return (values if dtype == t.dtype else round_to(values, t.dtype)).astype(dtype)


def round_to(values: Any, dtype: str) -> Any:
    """Rounds float32 values to what `dtype` can hold, and keeps them float32.

    XLA may drop a pair of casts there and back as excess precision, hence the explicit rounding. Its reduce_precision
    takes float16's subnormals to zero, so those are rounded as multiples of 2**-24.
    """
    if dtype == "float32":
        return values
    if _namespace(values) is np:
        return values.astype(dtype).astype(np.float32)
    if dtype == "bfloat16":
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    assert dtype == "float16", dtype
    subnormal = jnp.round(values * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(values) < 2.0**-14, subnormal, jax.lax.reduce_precision(values, 5, 10))
