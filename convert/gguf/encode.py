"""Encode float32 rows as GGUF's block types, byte for byte as llama.cpp's quantiser without an importance matrix.

The K-quants follow ggml's reference functions (`quantize_row_q4_K_ref` and its kin): each search is done for a slab of
blocks at once, element by element of the blocks, so that every float32 sum has llama.cpp's order of additions.
Equality holds for builds whose compiler keeps products and sums apart, as x86-64 builds of ggml's base library do.

Where `libgguf` is installed (the extra `kquants`), its compiled copies of those functions are called instead: the same
bytes, on all cores at once, where the searches in NumPy, of many short steps, mostly wait for Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize
from jaxtyping import Float, UInt8

from pallas_kernels.nf4 import on_all_cores

try:
    import libgguf
except ImportError:
    libgguf = None

# Elements that a thread works on at a time: the search's dozen temporaries stay in the cache.
_SLAB = 1 << 17
_SUPER = 256
# Below this, ggml takes a block for zero.
_TINY = np.float32(1e-15)
_DENSE = ("F32", "F16", "BF16")
_PLAIN = (*_DENSE, "Q8_0", "Q4_0", "Q5_0", "Q5_1")


def encode(rows: Float[np.ndarray, "N K"], kind: GGMLQuantizationType) -> UInt8[np.ndarray, "N bytes"]:
    """Encode a matrix row by row.

    Args:
        rows: of any float dtype, encoded as float32; K must be a multiple of the type's block (32, 256 for K-quants).
        kind: F32, F16, BF16, Q8_0, Q4_0, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K.

    Raises:
        ValueError: another type, rows that are no whole blocks, or values that are not finite (or, as F16 and in the
            scales of blocks, beyond 65504).
    """
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    columns = rows.shape[1]
    if kind.name not in (*_PLAIN, *(known.name for known in _SUPER_BLOCKS)):
        supported = ", ".join((*_PLAIN, *(known.name for known in _SUPER_BLOCKS)))
        raise ValueError(f"GGUF type {kind.name} cannot be written; choose one of {supported}")
    if columns % block_size:
        raise ValueError(f"rows of {columns} are no whole blocks of {block_size}, which {kind.name} needs")
    encoded = np.empty((rows.shape[0], columns // block_size * block_bytes), np.uint8)
    step = max(_SLAB // columns, 1)

    def part(start: int) -> None:
        some = np.ascontiguousarray(rows[start : start + step], np.float32)
        if not np.isfinite(some).all():
            raise ValueError(f"NaN or infinity cannot be written as {kind.name}; repair the weight")
        if libgguf is not None and kind.name not in _DENSE:
            libgguf.quantize_rows_into_raw(kind, some, encoded[start : start + step], *some.shape)
        elif kind in _SUPER_BLOCKS:
            encoded[start : start + step] = _super_blocks(some, _SUPER_BLOCKS[kind]).reshape(len(some), -1)
        else:
            # What overflows is reported below.
            with np.errstate(all="ignore"):
                encoded[start : start + step] = quantize(some, kind).view(np.uint8).reshape(len(some), -1)

    on_all_cores(part, range(0, len(rows), step))
    _check_scales(encoded, kind)
    return encoded


def _check_scales(encoded: np.ndarray, kind: GGMLQuantizationType) -> None:
    """Raise where a float16 of the encoding overflowed."""
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = encoded.reshape(-1, block_bytes)
    halves = {"F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for at in (208,) if kind.name == "Q6_K" else halves.get(kind.name, ()):
        if not np.isfinite(np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)).all():
            raise ValueError(f"values too large for the float16 of {kind.name}; write the model as F32 or BF16")


def _super_blocks(rows: np.ndarray, encoder: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    # Trials that divide by zero are never chosen.
    with np.errstate(all="ignore"):
        return encoder(rows.reshape(-1, _SUPER))


def _element_major(blocks: np.ndarray, width: int) -> np.ndarray:
    """[n, 256] -> [width, n * 256 / width]: sub-blocks side by side, so that sums over axis 0 run in order."""
    return np.ascontiguousarray(blocks.reshape(-1, width).T)


def _divide(one: np.ndarray | np.float32, other: np.ndarray) -> np.ndarray:
    """one / other, and 0 where `other` is 0."""
    return np.divide(one, other, out=np.zeros_like(other), where=other != 0)


def _scales_with_minimum(
    x: np.ndarray, top: int, first: float, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ggml's `make_qkx2_quants` for sub-blocks x [32, n]: scale [n], negated minimum [n], codes uint8 [32, n].

    The best of `steps` + 1 trial scales by weighted squared error, each refined by least squares; heavier weights for
    larger values. `top` is the largest code, and (top + first) / range the first trial's inverse scale.
    """
    f32 = np.float32
    weights = np.sqrt((x * x).sum(0) / f32(32)) + np.abs(x)
    weighted = weights * x
    sum_w, sum_x = weights.sum(0), weighted.sum(0)
    minimum, high = np.minimum(x.min(0), f32(0)), x.max(0)
    flat = high == minimum
    scale = _divide(f32(1), _divide(f32(top), high - minimum))

    def round_to_codes(numerator: np.float32) -> np.ndarray:
        # From the best minimum so far, not from the lowest value: each improvement moves the trials after it.
        codes = x - minimum
        codes *= _divide(numerator, high - minimum)
        return np.clip(np.rint(codes, out=codes), f32(0), f32(top), out=codes)

    def error_of(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        difference = scale * codes
        difference += minimum
        difference -= x
        difference *= difference
        difference *= weights
        return difference.sum(0)

    codes = round_to_codes(f32(top))
    best = error_of(codes, scale, minimum)
    for step in range(steps + 1):
        trial = round_to_codes(f32(first) + f32(0.1) * f32(step) + f32(top))
        product = weights * trial
        sum_l = product.sum(0)
        sum_xl = (product * x).sum(0)
        sum_l2 = np.multiply(product, trial, out=product).sum(0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        trial_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = trial_minimum > 0
        trial_minimum[positive] = 0
        trial_scale[positive] = (sum_xl / sum_l2)[positive]
        error = error_of(trial, trial_scale, trial_minimum)
        better = (determinant > 0) & (error < best)
        np.copyto(codes, trial, where=better)
        for kept, new in ((best, error), (scale, trial_scale), (minimum, trial_minimum)):
            np.copyto(kept, new, where=better)
    scale[flat] = 0
    codes[:, flat] = 0
    return scale, -minimum, codes.astype(np.uint8)


def _with_minimum(blocks: np.ndarray, top: int, first: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What Q4_K and Q5_K share: the 16 bytes [n, 16] of scales and minima, and the codes [n, 256]."""
    f32 = np.float32
    x = _element_major(blocks, 32)
    scales, minima, codes = _scales_with_minimum(x, top, first, steps)
    scales, minima = scales.reshape(-1, 8), minima.reshape(-1, 8)
    head = np.empty((len(blocks), 16), np.uint8)
    steps_of = []
    for place, values in ((0, scales), (2, minima)):
        largest = np.maximum(values.max(1), f32(0))
        inverse = np.where(largest > 0, _divide(f32(63), largest), f32(0))
        small = np.minimum(np.rint(inverse[:, None] * values).astype(np.int32).astype(np.uint8), np.uint8(63))
        half = (largest / f32(63)).astype(np.float16)
        head[:, place : place + 2] = half[:, None].view(np.uint8)
        steps_of.append((small, (half.astype(f32)[:, None] * small).reshape(-1)))
    (small_scales, step), (small_minima, offset) = steps_of
    # Eight pairs of 6 bits in 12 bytes: the upper two bits of the last four pairs go to the first eight bytes.
    head[:, 4:8] = small_scales[:, :4] | (small_scales[:, 4:] >> 4 << 6)
    head[:, 8:12] = small_minima[:, :4] | (small_minima[:, 4:] >> 4 << 6)
    head[:, 12:16] = (small_scales[:, 4:] & 15) | ((small_minima[:, 4:] & 15) << 4)
    final = np.clip(np.rint((x + offset) / step), 0, top)
    codes = np.where(step != 0, final, codes).astype(np.uint8)
    return head, codes.T.reshape(-1, _SUPER)


def _encode_q4_k(blocks: np.ndarray) -> np.ndarray:
    head, codes = _with_minimum(blocks, top=15, first=-1.0, steps=20)
    pairs = codes.reshape(-1, 4, 2, 32)
    return np.concatenate([head, (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)], axis=1)


def _encode_q5_k(blocks: np.ndarray) -> np.ndarray:
    head, codes = _with_minimum(blocks, top=31, first=-0.5, steps=15)
    eighths = codes.reshape(-1, 8, 32)
    high = np.bitwise_or.reduce(eighths >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    pairs = eighths.reshape(-1, 4, 2, 32) & 15
    return np.concatenate([head, high, (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)], axis=1)


def _symmetric_scales(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ggml's `make_qx_quants` for 6-bit sub-blocks x [16, n], weighted by x squared: scale [n], codes from 0."""
    f32 = np.float32
    size = np.abs(x)
    # The first of equally large values decides the sign.
    extreme = np.take_along_axis(x, size.argmax(0)[None], 0)[0]
    empty = size.max(0) < _TINY
    weighted = (x * x) * x
    square = x * x

    def trial(numerator: np.ndarray | np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = np.clip(np.rint((-numerator / extreme) * x), -32, 31)
        return codes, (weighted * codes).sum(0), ((square * codes) * codes).sum(0)

    codes, sum_lx, sum_l2 = trial(f32(32))
    scale = _divide(sum_lx, sum_l2)
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        new, sum_lx, sum_l2 = trial(f32(32) + f32(0.1) * f32(step))
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        np.copyto(codes, new, where=better)
        np.copyto(scale, sum_lx / sum_l2, where=better)
        np.copyto(best, scale * sum_lx, where=better)
    scale[empty] = 0
    codes = codes + 32
    codes[:, empty] = 0
    return scale, codes


def _encode_q6_k(blocks: np.ndarray) -> np.ndarray:
    f32 = np.float32
    x = _element_major(blocks, 16)
    scales, codes = _symmetric_scales(x)
    scales = scales.reshape(-1, 16)
    extreme = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)
    empty = np.abs(extreme[:, 0]) < _TINY
    inverse = f32(-128) / extreme
    half = (f32(1) / inverse).astype(np.float16)
    small = np.minimum(np.rint(inverse * scales), 127)
    small[empty], half[empty] = 0, 0
    small = small.astype(np.int8)
    step = (half.astype(f32) * small).reshape(-1)
    final = np.clip(np.rint(x / step), -32, 31) + 32
    codes = np.where(step != 0, final, codes).astype(np.uint8).T.reshape(-1, 2, 4, 32)
    codes[empty] = 0
    low, high = codes & 15, codes >> 4
    return np.concatenate(
        [
            (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128),
            (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64),
            small.view(np.uint8),
            half.view(np.uint8),
        ],
        axis=1,
    )


_SUPER_BLOCKS = {
    GGMLQuantizationType.Q4_K: _encode_q4_k,
    GGMLQuantizationType.Q5_K: _encode_q5_k,
    GGMLQuantizationType.Q6_K: _encode_q6_k,
}
