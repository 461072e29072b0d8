"""NF4's table in byte permutes: values of codes without a load, four bytes of codes at a time.

Why it exists: a gather is an address, a request and a wait for each value; permutes are register operations. They hold
16 bits of a value, so float32 is left to the table in memory, and so is Pallas' interpreter, which has no PTX but is
given a table of the same rounded values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plt

from pallas_kernels._triton import interpreting
from pallas_kernels.nf4.reference import NF4_TABLE

# For a byte of codes: its values in 16 bits beside each other, the high nibble's in the low half; or the 16 bits of one
# of them twice, which is a float32 close to it that needs no shift.
_PAIR, _HIGH_TWICE, _LOW_TWICE = ("0x4051", "0x6273"), ("0x5151", "0x7373"), ("0x4040", "0x6262")


def byte_permutes(bits: np.ndarray, picks: tuple[str, str] = _PAIR) -> str:
    """PTX from four bytes of codes ($4) to a word for each ($0 to $3), of the 16-bit table `bits` [16].

    A byte permute picks one of eight bytes by three bits; the two halves of the table are looked up apart, for the
    high and for the low byte of each value, and a third permute picks by the fourth bit. `picks` puts together the
    words of the first and of the second byte of two from low bytes (0 to 3) and high bytes (4 to 7) of their values,
    which stand in the order low nibble, high nibble.
    """
    wide = bits.astype(np.uint32)

    def words(shift: int) -> list[str]:
        octets = (wide >> shift & 255).reshape(4, 4)
        return [f"0x{int(np.sum(octet << np.arange(0, 32, 8))):08X}" for octet in octets]

    lines = ["and.b32 i0, $4, 0x77777777", "shr.u32 i1, i0, 16", "shr.u32 s0, $4, 1"]
    lines += ["and.b32 s0, s0, 0x44444444", "or.b32 s0, s0, 0x32103210", "shr.u32 s1, s0, 16"]
    for k in range(2):
        for name, (first, second, third, fourth) in (("high", words(8)), ("low", words(0))):
            lines += [f"prmt.b32 a, {first}, {second}, i{k}", f"prmt.b32 b, {third}, {fourth}, i{k}"]
            lines += [f"prmt.b32 {name}, a, b, s{k}"]
        lines += [f"prmt.b32 ${2 * k + i}, low, high, {pick}" for i, pick in enumerate(picks)]
    return "{\n.reg .b32 i0, i1, s0, s1, a, b, high, low;\n" + "".join(f"{line};\n" for line in lines) + "}"


def bits_in(dtype: Any) -> np.ndarray:
    """The table rounded to a 16-bit dtype, as uint16 [16]."""
    return NF4_TABLE.astype(dtype).view(np.uint16)


def bits_twice() -> np.ndarray:
    """uint16 [16]: the bits whose repetition is the float32 nearest to each value of the table."""
    near = bits_in(jnp.bfloat16).astype(np.uint32) + np.arange(-1, 2)[:, None].astype(np.uint32)
    error = np.abs(_repeated(near) - NF4_TABLE)
    best = near[np.argmin(error, axis=0), np.arange(16)]
    return np.where(NF4_TABLE == 0, 0, best).astype(np.uint16)


def _repeated(bits: np.ndarray) -> np.ndarray:
    bits = bits.astype(np.uint32) & 0xFFFF
    return (bits << 16 | bits).view(np.float32)


def table_of(dtype: Any, *, for_sums: bool = False) -> np.ndarray:
    """float32 [16]: the values that `table_values` gives for these arguments, and what its table_ref holds."""
    if dtype == jnp.bfloat16 and for_sums:
        return _repeated(bits_twice())
    return NF4_TABLE.astype(dtype).astype(np.float32)


def table_values(codes: Array, table_ref: Any, dtype: Any, *, for_sums: bool = False) -> tuple[Array, Array]:
    """In a kernel through Triton: uint8 codes to the values of their high and of their low nibbles.

    Args:
        table_ref: `table_of` the same arguments, for float32 and for the interpreter.
        dtype: the values are rounded to it, and are of it.
        for_sums: float32 instead, from values as coarse as `dtype` has them (bfloat16's are off by other amounts).
    """
    result = jnp.float32 if for_sums else dtype
    if interpreting() or dtype == jnp.float32:
        indices = codes.astype(jnp.int32)
        high, low = plt.load(table_ref.at[indices >> 4]), plt.load(table_ref.at[indices & 15])
    elif dtype == jnp.bfloat16 and for_sums:
        high, low = (
            lax.bitcast_convert_type(_assembly(byte_permutes(bits_twice(), picks), codes), jnp.float32)
            for picks in (_HIGH_TWICE, _LOW_TWICE)
        )
    else:
        pair = _assembly(byte_permutes(bits_in(dtype)), codes)
        high, low = (lax.bitcast_convert_type(half.astype(jnp.int16), dtype) for half in (pair, pair >> 16))
    return high.astype(result), low.astype(result)


def _assembly(text: str, codes: Array) -> Array:
    shape = jax.ShapeDtypeStruct(codes.shape, jnp.int32)
    [words] = plt.elementwise_inline_asm(
        text, args=[codes], constraints="=r,=r,=r,=r,r", pack=4, result_shape_dtypes=[shape]
    )
    return words
