"""The PTX of products of few rows: see mosaic_few.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels._ptx import EVERY_LANE, Program

# Rows of a weight that a block of threads takes at a time: of mma's operand.
TILE = 16
BLOCK, _BLOCKS = 64, 4
# Columns of the weight that one warp takes at a time.
CHUNK = BLOCK * _BLOCKS
_NESTED_BLOCK = 256
# Of a warp in a slot of the ring: its rows' codes, so far apart that four rows lie in other banks; and their scales,
# which are four floats, or four codes and, after those of all rows, one float.
_PITCH = CHUNK // 2 + 32
_SCALES_AT = TILE * _PITCH
_SLOT = _SCALES_AT + TILE * 16
_TABLE_BYTES = 256 * 32 * 4
# Rows of x that one mma takes.
_GROUP = 8
# Words from one of their sums to the next, of a tile's rows each: neither who writes nor who reads waits for a bank.
_SUMS_PITCH = TILE + 4


class Member(NamedTuple):
    """One weight of a launch, of `rows` rows, the first of which is `row` of the result.

    operand: the number of its first one: index, codes, absmax, then of nested scales absmax and offset, then of an
    adapter index and lora_b. rank: of its adapter, or 0. column: the adapter's first of `low`.
    """

    rows: int
    row: int
    operand: int
    rank: int
    column: int


class Launch(NamedTuple):
    """What a program is made for. m: rows of x. k: columns. nested: whether scales are. low: columns of `low`. *_wide:
    whether `low`, adapters and the result are float32, not bfloat16. low_parts: arrays `low`, one after the other,
    which add up; several of them for one weight alone, and in float32."""

    m: int
    k: int
    members: tuple[Member, ...]
    nested: bool
    low: int
    low_wide: bool
    ups_wide: bool
    result_wide: bool
    grid: int
    warps: int
    low_parts: int = 1

    @property
    def rounds(self) -> int:
        """How often a tile's warps take chunks until it is done."""
        return -(-self.k // (CHUNK * self.warps))

    @property
    def depth(self) -> int:
        """Items of a warp under way."""
        return 2 if self.rounds == 1 else 3

    @property
    def sums_bytes(self) -> int:
        """Of a tile's sums by warp."""
        return self.warps * self.m * _SUMS_PITCH * 4

    @property
    def shared_bytes(self) -> int:
        """Of the table, two tiles' sums, and the ring."""
        return _TABLE_BYTES + 2 * self.sums_bytes + self.depth * _SLOT * self.warps


@functools.lru_cache(64)
def program(launch: Launch) -> str:
    """Operands: x, pairs of values by byte, the 8-bit map, low, those of the members, the result, shared memory."""
    return _FewRows(launch).text()


class _FewRows:
    """Registers that live through the program, and its parts.

    A lane is g = lane / 4, t = lane % 4 in what follows: mma has its rows g and g + 8 of one operand, row g of the
    other, and columns 2 t, 2 t + 1 of their product in this lane. Of each 64 columns it takes sixteen from 16 t on.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.members, self.k, self.warps = launch, launch.members, launch.k, launch.warps
        self.groups, self.per_row, self.chunks = -(-launch.m // _GROUP), self.k // BLOCK, self.k // CHUNK
        self.rounds, self.depth, self.threads = launch.rounds, launch.depth, 32 * self.warps
        self.rows = sum(member.rows for member in self.members)
        self.of_scales = 4 if launch.nested else 2
        last = max(n.operand + 1 + self.of_scales + 2 * (n.rank > 0) for n in self.members)
        self.out, self.shared = f"${last}", f"${last + 1}"

    def text(self) -> str:
        """All of it."""
        p = self.p = Program()
        self._set_up()
        for _ in range(self.depth):
            self._copy_ahead()
        self._fill_table()
        x = self._x(p("min.u32", self.warp, self.chunks - 1)) if self.rounds == 1 else None
        # Of one weight all tiles have the same, made once where it takes adding up.
        self.low = [self._low(at, "0") for at in self._ranks()] if self.launch.low_parts > 1 else None
        p.do("bar.sync", 0)
        p.label("items")
        p.do("cp.async.wait_group", self.depth - 1)
        p.do("bar.warp.sync", EVERY_LANE)
        codes, scales = self._codes(), self._scales()
        chunk = p("mad.lo.u32", self.round, self.warps, self.warp)
        if self.rounds * self.warps > self.chunks:
            inside = p.test("lt", chunk, self.chunks)
            scales = [p("selp.b32", scale, 0, inside) for scale in scales]
        adapters = self._adapters() if self.launch.low else []
        self._multiply(codes, scales, x or self._x(p("min.u32", chunk, self.chunks - 1)))
        # The slot that is written to next has been read by all lanes.
        p.do("bar.warp.sync", EVERY_LANE)
        self._copy_ahead()
        if self.rounds > 1:
            p.do("bra", "next", when=p.test("ne", self.round, self.rounds - 1))
        for a, b in adapters:
            for group in range(self.groups):
                self._mma(self.sums[group], a, b[group], self.sums[group])
        self._store()
        p.label("next")
        self._step(self.tile, self.round, self.slot)
        p.do("bra", "items", when=p.test("lt", self.tile, self.rows // TILE))
        return p.text()

    def _set_up(self) -> None:
        p = self.p
        self.thread, block = p("mov.u32", "%tid.x"), p("mov.u32", "%ctaid.x")
        self.lane, self.warp = p("and.b32", self.thread, 31), p("shr.u32", self.thread, 5)
        self.g, self.t = p("shr.u32", self.lane, 2), p("and.b32", self.lane, 3)
        self.zero = p("mov.b32", 0)
        # Where the item that is worked on and the one that is copied ahead are: tile, round of its columns, slot.
        self.tile, self.ahead = p("mov.u32", block), p("mov.u32", block)
        self.round, self.slot, self.ahead_round, self.ahead_slot, self.parity = (p("mov.u32", 0) for _ in range(5))
        self.sums = [[p("mov.b32", 0) for _ in range(4)] for _ in range(self.groups)]
        ring = p("add.u32", self.shared, _TABLE_BYTES + 2 * self.launch.sums_bytes)
        self.ring = p("mad.lo.u32", self.warp, _SLOT, ring)
        self.codes_at, self.absmax_at, self.nested_at, self.offsets = (self._bases(i) for i in range(4))
        self.ups = self._bases(4)
        self.rows_of_x = [p("min.u32", p("add.u32", self.g, 8 * i), self.launch.m - 1) for i in range(self.groups)]

    def _bases(self, which: int) -> list[Any]:
        """Of each weight, where its layer's codes, scales, nested scales or lora_b begin, or what the offset is."""
        p, bases, launch = self.p, [], self.launch
        for n in self.members:
            index = p("ld.global.nc.b32", f"[${n.operand}]")
            if which < 2:
                row_bytes = (self.k // 2, self.per_row * self._scale_bytes())[which]
                base = p.address(index, n.rows * row_bytes, f"${n.operand + 1 + which}")
                # As if the weight began at the result's first row.
                base = p("sub.u64", base, n.row * row_bytes, kind="b64") if n.row else base
            elif which < 4 and launch.nested:
                count = -(-n.rows * self.per_row // _NESTED_BLOCK) if which == 2 else 1
                base = p.address(index, 4 * count, f"${n.operand + 1 + which}")
                base = p("ld.global.nc.f32", f"[{base}]") if which == 3 else base
            elif which == 4 and n.rank:
                index = p("ld.global.nc.b32", f"[${n.operand + 1 + self.of_scales}]")
                size = n.rows * n.rank * (4 if launch.ups_wide else 2)
                base = p.address(index, size, f"${n.operand + 2 + self.of_scales}")
            else:
                base = self.out  # never read
            bases.append(base)
        return bases

    def _scale_bytes(self) -> int:
        return 1 if self.launch.nested else 4

    def _of_member(self, tile: str, values: Sequence[Any], kind: str = "b32") -> Any:
        """That of these values which belongs to a tile's weight."""
        chosen = values[0]
        for member, value in zip(self.members[1:], values[1:], strict=True):
            if value != chosen:
                later = self.p.test("ge", tile, member.row // TILE)
                chosen = self.p(f"selp.{kind}", value, chosen, later, kind=kind)
        return chosen

    def _step(self, tile: str, round_: str, slot: str) -> None:
        """To this block's next item."""
        p, size = self.p, _SLOT * self.warps
        p.do("add.u32", slot, slot, size)
        p.do("mov.u32", slot, 0, when=p.test("ge", slot, self.depth * size))
        p.do("add.u32", round_, round_, 1)
        done = p.test("ge", round_, self.rounds)
        p.do("mov.u32", round_, 0, when=done)
        p.do("add.u32", tile, tile, self.launch.grid, when=done)

    def _copy_ahead(self) -> None:
        """Begins to copy an item's codes and scales for this warp, if there is one: eight lanes to a row's line."""
        p, k, tile = self.p, self.k, self.ahead
        there = p.test("lt", tile, self.rows // TILE)
        chunk = p("min.u32", p("mad.lo.u32", self.ahead_round, self.warps, self.warp), self.chunks - 1)
        first, to = p("mul.lo.u32", tile, TILE), p("add.u32", self.ring, self.ahead_slot)
        line, piece = p("shr.u32", self.lane, 3), p("and.b32", self.lane, 7)
        codes = p.address(chunk, CHUNK // 2, self._of_member(tile, self.codes_at, "b64"))
        codes = p.address(piece, 16, p.address(p("add.u32", first, line), k // 2, codes))
        lane_to = p("mad.lo.u32", piece, 16, p("mad.lo.u32", line, _PITCH, to))
        for more in range(0, TILE, 4):
            places = (f"[{lane_to}+{more * _PITCH}]", f"[{codes}+{more * (k // 2)}]")
            p.do("cp.async.cg.shared.global", *places, 16, when=there)
        # Of scales a lane has a row, half of the lanes none.
        there = p.test("lt", tile, p("selp.b32", self.rows // TILE, 0, p.test("lt", self.lane, TILE)))
        row, size = p("add.u32", first, self.lane), _BLOCKS * self._scale_bytes()
        absmax = p.address(row, self.per_row // _BLOCKS * size, self._of_member(tile, self.absmax_at, "b64"))
        lane_to = p("add.u32", to, p("mul.lo.u32", self.lane, size))
        places = (f"[{lane_to}+{_SCALES_AT}]", f"[{p.address(chunk, size, absmax)}]")
        p.do("cp.async.ca.shared.global", *places, size, when=there)
        if self.launch.nested:
            own = p("sub.u32", row, self._of_member(tile, [n.row for n in self.members]))
            number = p("mad.lo.u32", own, self.per_row, p("mul.lo.u32", chunk, _BLOCKS))
            index = p("shr.u32", number, _NESTED_BLOCK.bit_length() - 1)
            nested = p.address(index, 4, self._of_member(tile, self.nested_at, "b64"))
            places = (f"[{lane_to}+{_SCALES_AT + TILE * size}]", f"[{nested}]")
            p.do("cp.async.ca.shared.global", *places, 4, when=there)
        p.do("cp.async.commit_group")
        self._step(self.ahead, self.ahead_round, self.ahead_slot)

    def _fill_table(self) -> None:
        """A thread writes the 32 copies of a byte's pair, neighbours to other banks at a time."""
        p = self.p
        for first in range(0, 256, self.threads):
            entry = p("add.u32", self.thread, first)
            inside = p.test("lt", entry, 256)
            pair = p("ld.global.nc.b32", f"[{p.address(p('and.b32', entry, 255), 4, '$1')}]")
            row = p("mad.lo.u32", entry, 128, self.shared)
            for turn in range(8):
                column = p("and.b32", p("add.u32", self.lane, turn), 7)
                p.do("st.shared.v4.b32", f"[{p('mad.lo.u32', column, 16, row)}]", [pair] * 4, when=inside)
        self.table = p("mad.lo.u32", self.lane, 4, self.shared)

    def _x(self, chunk: str) -> list[list[list[str]]]:
        """x's part in a chunk: of each eight rows, of each block, eight registers of pairs."""
        p, result = self.p, []
        column = p("mad.lo.u32", chunk, CHUNK, p("shl.b32", self.t, 4))
        for row in self.rows_of_x:
            at = p.address(row, 2 * self.k, p.address(column, 2, "$0"))
            blocks = [p.registers(8) for _ in range(_BLOCKS)]
            for number, some in enumerate(blocks):
                for half in (0, 1):
                    place = f"[{at}+{2 * BLOCK * number + 16 * half}]"
                    p.do("ld.global.v4.b32", some[4 * half : 4 * half + 4], place)
            result.append(blocks)
        return result

    def _codes(self) -> list[list[list[str]]]:
        """Of the two rows, of each block, two words."""
        p = self.p
        at = p("mad.lo.u32", self.t, 8, p("mad.lo.u32", self.g, _PITCH, p("add.u32", self.ring, self.slot)))
        codes = [[p.registers(2) for _ in range(_BLOCKS)] for _ in range(2)]
        for half, blocks in enumerate(codes):
            for block, words in enumerate(blocks):
                p.do("ld.shared.v2.b32", words, f"[{at}+{8 * half * _PITCH + block * BLOCK // 2}]")
        return codes

    def _scales(self) -> list[str]:
        """Of the two rows, the scale of block t."""
        p, size, scales = self.p, _BLOCKS * self._scale_bytes(), []
        base = p("add.u32", p("add.u32", self.ring, self.slot), _SCALES_AT)
        offset, shift = self._of_member(self.tile, self.offsets), p("shl.b32", self.t, 3)
        for half in (0, 8):
            at = p("mad.lo.u32", p("add.u32", self.g, half), size, base)
            if not self.launch.nested:
                scales.append(p("ld.shared.b32", f"[{p('mad.lo.u32', self.t, 4, at)}]"))
                continue
            code = p("and.b32", p("shr.u32", p("ld.shared.b32", f"[{at}]"), shift), 255)
            value = p("ld.global.nc.f32", f"[{p.address(code, 4, '$2')}]")
            nested = p("ld.shared.f32", f"[{at}+{TILE * size}]")
            scales.append(p("add.rn.f32", p("mul.rn.f32", value, nested), offset))
        return scales

    def _mma(self, result: list[str], a: list[str], b: list[str], c: list[str]) -> None:
        self.p.do("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", result, a, b, c)

    def _multiply(self, codes: list[list[list[str]]], scales: list[str], x: list[list[list[str]]]) -> None:
        """Adds a chunk's products to the sums."""
        p = self.p
        for block in range(_BLOCKS):
            values = [[self._pair(word, i) for word in codes[half][block] for i in range(4)] for half in range(2)]
            # The lane of the same row that has this block's scale.
            own = [p("shfl.sync.idx.b32", scale, block, "0x1c1f", EVERY_LANE) for scale in scales]
            for group, sums in enumerate(self.sums):
                part = [self.zero] * 4
                for i in range(0, 8, 2):
                    a = [values[0][i], values[1][i], values[0][i + 1], values[1][i + 1]]
                    before, part = part, p.registers(4)
                    self._mma(part, a, x[group][block][i : i + 2], before)
                for i in range(4):
                    p.do("fma.rn.f32", sums[i], part[i], own[i // 2], sums[i])

    def _pair(self, word: str, byte: int) -> str:
        """The values of a byte of four: 128 bytes for each code, one word in each bank."""
        at = self.p("dp4a.u32.u32", word, f"0x{128 << 8 * byte:08X}", self.table)
        return self.p("ld.shared.b32", f"[{at}]")

    def _adapters(self) -> list[tuple[list[str], list[list[str]]]]:
        """Operands of mma for this warp's part of the ranks, sixteen at a time; nothing of it in most warps."""
        p, launch = self.p, self.launch
        up = self._of_member(self.tile, self.ups, "b64")
        ranks, rows, columns = ([getattr(n, x) for n in self.members] for x in ("rank", "row", "column"))
        rank, first, column = (self._of_member(self.tile, some) for some in (ranks, rows, columns))
        row = p("sub.u32", p("mad.lo.u32", self.tile, TILE, self.g), first)
        result = []
        for number, places in enumerate(self._ranks(rank)):
            a: list[str] = []
            for here, inside in places:
                for more in (0, 8):
                    index = p("mad.lo.u32", p("add.u32", row, more), rank, here)
                    a.append(self._two(index, up, launch.ups_wide, inside))
            result.append((a, self.low[number] if self.low else self._low(places, column)))
        return result

    def _ranks(self, rank: Any = None) -> list[list[tuple[str, str]]]:
        """Of each sixteen ranks that this warp has: the two places where a lane reads neighbours, and whether there are
        any."""
        p, result = self.p, []
        rank = self.members[0].rank if rank is None else rank
        for number in range(0, -(-max(n.rank for n in self.members) // 16), self.warps):
            at = p("mad.lo.u32", p("add.u32", self.warp, number), 16, p("shl.b32", self.t, 1))
            places = [p("add.u32", at, half) for half in (0, 8)]
            result.append([(here, p.test("lt", here, rank)) for here in places])
        return result

    def _low(self, places: list[tuple[str, str]], column: Any) -> list[list[str]]:
        """mma's operand of `low` at these places, of each eight rows."""
        p, launch = self.p, self.launch
        result: list[list[str]] = [[] for _ in range(self.groups)]
        for here, inside in places:
            for group, some in enumerate(result):
                index = p("mad.lo.u32", self.rows_of_x[group], launch.low, p("add.u32", here, column))
                some.append(self._two(index, "$3", launch.low_wide, inside, launch.low_parts))
        return result

    def _two(self, index: str, base: str, wide: bool, inside: str, parts: int = 1) -> str:
        """Two neighbours in memory, or sums of those of several arrays, as bfloat16; or zeros."""
        p, read = self.p, []
        at, apart = p.address(index, 4 if wide else 2, base), 4 * self.launch.m * self.launch.low
        for part in range(parts):
            words, place = [p("mov.b32", 0) for _ in range(1 + wide)], f"[{at}+{part * apart}]"
            p.do("ld.global.nc.v2.b32" if wide else "ld.global.nc.b32", words if wide else words[0], place, when=inside)
            read.append(words)
        while len(read) > 1:
            sums = [[p("add.rn.f32", *two) for two in zip(*pair, strict=True)] for pair in zip(read[::2], read[1::2])]
            read = sums + read[len(read) // 2 * 2 :]
        words = read[0]
        return p("cvt.rn.bf16x2.f32", words[1], words[0]) if wide else words[0]

    def _store(self) -> None:
        """Adds up the warps' sums and stores the tile; sums are zero afterwards.

        Two places take turns: a warp that is a tile ahead writes to the other one, and none is two tiles ahead.
        """
        p, m, size = self.p, self.launch.m, self.launch.sums_bytes
        base = p("add.u32", p("add.u32", self.shared, _TABLE_BYTES), self.parity)
        of_x = p("shl.b32", self.t, 1)
        at = p("mad.lo.u32", p("mad.lo.u32", self.warp, m, of_x), 4 * _SUMS_PITCH, p("mad.lo.u32", self.g, 4, base))
        for group, sums in enumerate(self.sums):
            for i, register in enumerate(sums):
                more, half = _GROUP * group + i % 2, i // 2 * 8
                inside = None if more + _GROUP - 2 < m else p.test("lt", p("add.u32", of_x, more), m)
                p.do("st.shared.b32", f"[{at}+{4 * (more * _SUMS_PITCH + half)}]", register, when=inside)
                p.do("mov.b32", register, 0)
        p.do("bar.sync", 0)
        p.do("sub.u32", self.parity, size, self.parity)
        for first in range(0, TILE * m, self.threads):
            # Neighbours are rows of the weight, which are columns of the result.
            number = p("add.u32", self.thread, first)
            row, column = p("and.b32", number, TILE - 1), p("shr.u32", number, 4)
            p.do("bra", f"stored{first}", when=p.test("ge", column, m))
            at = p("mad.lo.u32", p("mad.lo.u32", column, _SUMS_PITCH, row), 4, base)
            parts = [p("ld.shared.f32", f"[{at}+{4 * w * m * _SUMS_PITCH}]") for w in range(self.warps)]
            while len(parts) > 1:
                odd = parts[len(parts) // 2 * 2 :]
                parts = [p("add.rn.f32", a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
            index = p("mad.lo.u32", column, self.rows, p("mad.lo.u32", self.tile, TILE, row))
            if self.launch.result_wide:
                p.do("st.global.f32", f"[{p.address(index, 4, self.out)}]", parts[0])
            else:
                value = p("cvt.rn.bf16.f32", parts[0], kind="b16")
                p.do("st.global.b16", f"[{p.address(index, 2, self.out)}]", value)
            p.label(f"stored{first}")
