"""NF4 decoding as PTX through Mosaic.

Why it exists: Pallas' Triton lowering is deprecated, and this needs nothing of it. A warp decodes 1,024 neighbours: a
lane reads four bytes at a time and writes the eight values of them, so that both are whole lines of memory; each lane
holds one of the table's sixteen values and one of the 16 blocks' scales, which the others fetch by shuffles. Numerics:
the reference's, to the bit. Refuses what is not decoded to its own dtype of 16 bits in whole warps of blocks of 64,
GPUs other than Hopper, and JAX before 0.11.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels._mosaic import hopper_reason
from pallas_kernels._ptx import EVERY_LANE, Program, launch
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE
from pallas_kernels.nf4.tensor import NF4Tensor

_BLOCK, _NESTED_BLOCK = 64, 256
# Words of eight codes that a lane decodes, 32 of a warp at a time, and warps of a program.
_WORDS, _WARPS = 4, 4
_PROGRAM = _WARPS * 32 * _WORDS * 8
_CONVERSIONS = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}
# Where a word holds its codes, in their order: high nibbles of its bytes first.
_SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)


def unsupported_reason(t: NF4Tensor, dtype: Any) -> str | None:
    """Why t cannot be decoded to `dtype` by this kernel on this device, or None."""
    if t.stack_shape:
        return f"it decodes one weight, and this is a stack {t.stack_shape}"
    if t.block_size != _BLOCK or t.shape[0] * t.shape[1] % _PROGRAM:
        return (
            f"it decodes {_PROGRAM} elements at a time in blocks of {_BLOCK}, and this is {t.shape} in {t.block_size}"
        )
    if t.nested_dtype != "float32" or t.dtype not in _CONVERSIONS or np.dtype(dtype).name != t.dtype:
        return f"it decodes to a weight's own 16 bits with scales of float32, not {t.dtype} to {np.dtype(dtype).name}"
    return hopper_reason()


def nf4_dequantize_mosaic(t: NF4Tensor) -> Array:
    """See `pallas_kernels.nf4.api.dequantize`; of t's own dtype."""
    operands = [t.codes, t.absmax, jnp.asarray(NF4_TABLE)]
    operands += [jnp.asarray(DYNAMIC_MAP), t.nested_absmax, jnp.reshape(t.nested_offset, (1,))] if t.is_nested else []
    out = jax.ShapeDtypeStruct(t.shape, t.dtype)
    grid = t.shape[0] * t.shape[1] // _PROGRAM
    return launch(program(t.is_nested, t.dtype), operands, out, grid=grid, warps=_WARPS, shared=0, name="nf4_decode")


@functools.lru_cache(8)
def program(nested: bool, dtype: str) -> str:
    """Operands: codes, absmax, the table, of nested scales map, absmax and offset, the result."""
    p, out = Program(), "$6" if nested else "$3"
    thread, block = p("mov.u32", "%tid.x"), p("mov.u32", "%ctaid.x")
    lane, warp = p("and.b32", thread, 31), p("shr.u32", thread, 5)
    first = p("mul.lo.u32", p("mad.lo.u32", block, _WARPS, warp), 32 * _WORDS)
    word = p("add.u32", first, lane)
    at = p.address(word, 4, "$0")
    codes = [p("ld.global.nc.L1::no_allocate.b32", f"[{at}+{128 * i}]") for i in range(_WORDS)]
    value = p("ld.global.nc.b32", f"[{p.address(p('and.b32', lane, 15), 4, '$2')}]")
    number = p("add.u32", p("shr.u32", first, 3), p("and.b32", lane, 4 * _WORDS - 1))
    if nested:
        code = p("ld.global.nc.u8", f"[{p.address(number, 1, '$1')}]")
        scale = p("ld.global.nc.f32", f"[{p.address(code, 4, '$3')}]")
        nested_at = p.address(p("shr.u32", number, _NESTED_BLOCK.bit_length() - 1), 4, "$4")
        scale = p("mul.rn.f32", scale, p("ld.global.nc.f32", f"[{nested_at}]"))
        scale = p("add.rn.f32", scale, p("ld.global.nc.f32", "[$5]"))
    else:
        scale = p("ld.global.nc.f32", f"[{p.address(number, 4, '$1')}]")
    to, eighth = p.address(word, 16, out), p("shr.u32", lane, 3)
    for i, word_of_codes in enumerate(codes):
        own = p("shfl.sync.idx.b32", scale, p("add.u32", eighth, 4 * i), "0x1f", EVERY_LANE)
        values = []
        for shift in _SHIFTS:
            index = p("shr.u32", word_of_codes, shift)
            # Of sixteen lanes the one that the index's last four bits say.
            values.append(p("mul.rn.f32", p("shfl.sync.idx.b32", value, index, "0x101f", EVERY_LANE), own))
        pairs = [p(_CONVERSIONS[dtype], values[j + 1], values[j]) for j in range(0, 8, 2)]
        p.do("st.global.cs.v4.b32", f"[{to}+{512 * i}]", pairs)
    return p.text()
