"""What the product through Mosaic says in PTX: scales into shared memory, and bytes of codes into wgmma's registers.

Of a warpgroup's 64 rows of a weight each warp has 16. A lane is g = lane / 4, t = lane % 4: it has rows g and g + 8 of
its warp's, and of each 8 columns the two from 2 t on, which are one byte of codes.
"""

from __future__ import annotations

import functools

from pallas_kernels._ptx import EVERY_LANE, Program

_NESTED_BLOCK = 256


def scales_pitch(blocks: int) -> int:
    """Words of shared memory for a row of scales: odd, or eight rows would wait for one bank."""
    return blocks + 1 - blocks % 2


@functools.lru_cache(64)
def scales_text(blocks: int, per_row: int, nested: bool) -> str:
    """Decodes the scales of `blocks` blocks of this warpgroup's rows: $0[warp * 8 + g, block], rows g and g + 8 side by
    side in bfloat16.

    $1: the first row's first scale here. $2: the weight's first one. With nested scales $3: the 8-bit map, $4, $5:
    the nested scales and their offset. per_row: blocks of a row of the weight.
    """
    p = Program()
    warp, g, t = _places(p)
    offset = p("ld.global.nc.f32", "[$5]") if nested else None
    before = p("cvt.u32.u64", p("sub.u64", "$1", "$2", kind="b64"))
    row = p("mad.lo.u32", warp, 16, g)
    to = p("mad.lo.u32", p("mad.lo.u32", warp, 8, g), 4 * scales_pitch(blocks), "$0")
    for first in range(0, blocks, 4):
        block = p("add.u32", t, first)
        inside = p.test("lt", block, blocks)
        halves = []
        for more in (0, 8):
            number = p("mad.lo.u32", p("add.u32", row, more), per_row, p("min.u32", block, blocks - 1))
            if offset is None:
                halves.append(p("ld.global.nc.f32", f"[{p.address(number, 4, '$1')}]"))
                continue
            code = p("ld.global.nc.u8", f"[{p.address(number, 1, '$1')}]")
            value = p("ld.global.nc.f32", f"[{p.address(code, 4, '$3')}]")
            at = p("shr.u32", p("add.u32", number, before), _NESTED_BLOCK.bit_length() - 1)
            scale = p("mul.rn.f32", value, p("ld.global.nc.f32", f"[{p.address(at, 4, '$4')}]"))
            halves.append(p("add.rn.f32", scale, offset))
        both = p("cvt.rn.bf16x2.f32", halves[1], halves[0])
        p.do("st.shared.b32", f"[{p('mad.lo.u32', block, 4, to)}]", both, when=inside)
    # Each warp reads its own alone.
    p.do("bar.warp.sync", EVERY_LANE)
    return p.text()


@functools.lru_cache(64)
def weights_text(row_bytes: int, scale_row_bytes: int) -> str:
    """A tile of 64 x 64 weights: $0 to $7 the pairs of row g, of each 8 columns one, $8 to $15 those of row g + 8.

    $16: its first byte of codes in shared memory, where rows are row_bytes apart. $17: the table. $18: the scales of
    its block as `scales_text` left them, in rows scale_row_bytes apart. A lane reads the 32 bytes of a row, as the
    other lanes of the row do, and picks its own.
    """
    p = Program()
    warp, g, t = _places(p)
    table = p("mad.lo.u32", p("mov.u32", "%laneid"), 4, "$17")
    own = p("shl.b32", 128, p("shl.b32", t, 3))
    row = p("mad.lo.u32", p("mad.lo.u32", warp, 16, g), row_bytes, "$16")
    words = []
    for more in (0, 8):
        for half in (0, 16):
            words.append(p.registers(4))
            p.do("ld.shared.v4.b32", words[-1], f"[{row}+{more * row_bytes + half}]")
    scales = p("ld.shared.b32", f"[{p('mad.lo.u32', p('mad.lo.u32', warp, 8, g), scale_row_bytes, '$18')}]")
    for more, pick in enumerate(("0x1010", "0x3232")):
        scale = p("prmt.b32", scales, scales, pick)
        for i, word in enumerate(words[2 * more] + words[2 * more + 1]):
            pair = p("ld.shared.b32", f"[{p('dp4a.u32.u32', word, own, table)}]")
            p.do("mul.rn.bf16x2", f"${8 * more + i}", pair, scale)
    return p.text()


def _places(p: Program) -> tuple[str, str, str]:
    """Warp of its warpgroup, g and t."""
    lane = p("mov.u32", "%laneid")
    warp = p("and.b32", p("shr.u32", p("mov.u32", "%tid.x"), 5), 3)
    return warp, p("shr.u32", lane, 2), p("and.b32", lane, 3)
