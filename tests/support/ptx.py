"""An interpreter, in NumPy, of the PTX that kernels here are written in: all threads of a block step by step together.

Memory is checked: each access must be aligned and lie within one of the arrays given. Copies that a GPU makes in the
background are made at once, and barriers do nothing, so it finds no race.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

Lanes = np.ndarray  # uint64 [threads]: the registers of a name
_WORD = np.uint64(0xFFFFFFFF)
_GAP = 256
_BYTES = {"u8": 1, "b16": 2, "b32": 4, "f32": 4}


def _floats(bits: Lanes) -> np.ndarray:
    return (bits & _WORD).astype(np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> Lanes:
    return np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)


def _bf16(bits: Lanes, shift: int = 0) -> np.ndarray:
    """The bfloat16 in these 16 bits, as float32."""
    return ((bits >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> Lanes:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint64)


def _to_f16(values: np.ndarray) -> Lanes:
    return values.astype(np.float16).view(np.uint16).astype(np.uint64)


def _bytes(word: Lanes) -> list[Lanes]:
    return [word >> np.uint64(8 * i) & np.uint64(255) for i in range(4)]


def _prmt(a: Lanes, b: Lanes, selectors: Lanes) -> Lanes:
    both = a & _WORD | b << np.uint64(32)
    picked = [both >> (selectors >> np.uint64(4 * i) & np.uint64(7)) * np.uint64(8) & np.uint64(255) for i in range(4)]
    return sum(byte << np.uint64(8 * i) for i, byte in enumerate(picked))


def _shuffle(values: Lanes, source: Lanes, clamp: Lanes, _: Lanes) -> Lanes:
    segment = int(clamp[0]) >> 8 & 31
    lanes = np.arange(32) & segment | source.reshape(-1, 32).astype(int) & ~segment & 31
    return np.take_along_axis(values.reshape(-1, 32), lanes, axis=1).ravel()


_OPERATIONS: dict[str, Callable[..., Lanes]] = {
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "add.u32": lambda a, b: a + b & _WORD,
    "sub.u32": lambda a, b: a - b & _WORD,
    "sub.u64": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b & _WORD,
    "mad.lo.u32": lambda a, b, c: a * b + c & _WORD,
    "mad.wide.u32": lambda a, b, c: a * b + c,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b & _WORD,
    "shr.u32": lambda a, b: a >> b,
    "min.u32": np.minimum,
    "setp.lt.u32": lambda a, b: a < b,
    "setp.ge.u32": lambda a, b: a >= b,
    "setp.ne.u32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "selp.b64": lambda a, b, p: np.where(p, a, b),
    "prmt.b32": _prmt,
    "dp4a.u32.u32": lambda a, b, c: c + sum(x * y for x, y in zip(_bytes(a), _bytes(b), strict=True)) & _WORD,
    "cvt.u32.u64": lambda a: a & _WORD,
    "mul.rn.f32": lambda a, b: _bits(_floats(a) * _floats(b)),
    "add.rn.f32": lambda a, b: _bits(_floats(a) + _floats(b)),
    "fma.rn.f32": lambda a, b, c: _bits(_floats(a).astype(np.float64) * _floats(b) + _floats(c)),
    "cvt.rn.bf16.f32": lambda a: _to_bf16(_floats(a)),
    "cvt.rn.bf16x2.f32": lambda high, low: _to_bf16(_floats(low)) | _to_bf16(_floats(high)) << np.uint64(16),
    "cvt.rn.f16x2.f32": lambda high, low: _to_f16(_floats(low)) | _to_f16(_floats(high)) << np.uint64(16),
    "mul.rn.bf16x2": lambda a, b: (
        _to_bf16(_bf16(a) * _bf16(b)) | _to_bf16(_bf16(a, 16) * _bf16(b, 16)) << np.uint64(16)
    ),
    "shfl.sync.idx.b32": _shuffle,
}
_NOTHING = ("bar.", "cp.async.commit_group", "cp.async.wait_group")


def _mma(a: list[Lanes], b: list[Lanes], c: list[Lanes]) -> list[Lanes]:
    """mma.m16n8k16 of each warp, by the layouts of PTX's manual."""
    a, b, c = ([register.reshape(-1, 32) for register in some] for some in (a, b, c))
    warps, (g, t) = a[0].shape[0], divmod(np.arange(32), 4)
    left, right, sums = (np.zeros((warps, *shape), np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    for high in range(2):
        for i in range(4):
            left[:, g + 8 * (i % 2), 2 * t + 8 * (i // 2) + high] = _bf16(a[i], 16 * high)
        for i in range(2):
            right[:, 2 * t + 8 * i + high, g] = _bf16(b[i], 16 * high)
        for i in range(2):
            sums[:, g + 8 * i, 2 * t + high] = _floats(c[2 * i + high])
    sums += left @ right
    return [_bits(sums[:, g + 8 * (i // 2), 2 * t + i % 2]).ravel() for i in range(4)]


class Machine:
    """A GPU of one block at a time."""

    def __init__(self, arrays: Sequence[np.ndarray], shared: int = 0) -> None:
        """`addresses` says where the arrays lie."""
        self.addresses, end = [], _GAP
        for array in arrays:
            self.addresses.append(end)
            end += -(-array.nbytes // _GAP) * _GAP + _GAP
        self.memory, self.shared = np.zeros(end, np.uint8), np.zeros(shared, np.uint8)
        self._valid = np.zeros(end, bool), np.ones(shared, bool)
        for at, array in zip(self.addresses, arrays, strict=True):
            self.memory[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
            self._valid[0][at : at + array.nbytes] = True

    def run(self, text: str, operands: Sequence[Any], *, threads: int, block: int = 0) -> dict[str, Lanes]:
        """The registers after a program; operands: numbers, or of each thread one."""
        number = np.arange(threads, dtype=np.uint64)
        special = {"%tid.x": number, "%laneid": number % 32, "%ctaid.x": np.full(threads, block, np.uint64)}
        self.registers = special | {
            f"${i}": x + 0 * number for i, x in enumerate(np.asarray(x, np.uint64) for x in operands)
        }
        self._threads = threads
        lines = [line.strip().rstrip(";") for line in text.split("\n")]
        lines = [line for line in lines if line not in ("", "{", "}") and not line.startswith(".reg")]
        at, skipping = 0, None
        while at < len(lines):
            line, at = lines[at], at + 1
            if line.endswith(":"):
                skipping = None if skipping and skipping[0] == line[:-1] else skipping
                continue
            active = np.ones(threads, bool)
            if line.startswith("@"):
                predicate, line = line[1:].split(" ", 1)
                active = self.registers[predicate].astype(bool)
            if skipping:
                active = active & ~skipping[1]
            operation, _, rest = line.partition(" ")
            if operation == "bra":
                if active.all():
                    at = lines.index(f"{rest}:")
                elif active.any():
                    assert skipping is None, "threads part once at a time"
                    assert lines.index(f"{rest}:") >= at, "threads part only to meet again"
                    skipping = rest, active
            elif not operation.startswith(_NOTHING):
                operands_ = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                self._execute(operation, operands_, active)
        return self.registers

    def _value(self, name: str) -> Lanes:
        if name in self.registers:
            return self.registers[name]
        return np.full(self._threads, int(name[2:], 16) if name.startswith("0x") else int(name), np.uint64)

    def _write(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        old = self.registers.get(name)
        self.registers[name] = value if active.all() or old is None else np.where(active, value, old)

    def _execute(self, operation: str, operands: list[str], active: np.ndarray) -> None:
        lists = [x.strip("{}").replace(" ", "").split(",") for x in operands]
        if operation.startswith("mma."):
            results = _mma(*([self._value(x) for x in some] for some in lists[1:]))
            for name, value in zip(lists[0], results, strict=True):
                self._write(name, value, active)
        elif operation.startswith("cp.async"):
            for i in range(int(operands[2])):
                byte = self._access(operands[1], int(operands[2]), i, active, shared=False)
                self._access(operands[0], int(operands[2]), i, active, shared=True, value=byte)
        elif operation.startswith(("ld.", "st.")):
            size, load, shared = _BYTES[operation.split(".")[-1]], operation[0] == "l", ".shared" in operation
            place, names = (operands[1], lists[0]) if load else (operands[0], lists[1])
            for number, name in enumerate(names):
                places = [(place, size * len(names), size * number + i) for i in range(size)]
                if load:
                    parts = [self._access(*where, active, shared) << np.uint64(8 * i) for i, where in enumerate(places)]
                    self._write(name, sum(parts), active)
                    continue
                for i, where in enumerate(places):
                    self._access(*where, active, shared, value=self._value(name) >> np.uint64(8 * i) & np.uint64(255))
        else:
            self._write(lists[0][0], _OPERATIONS[operation](*(self._value(x[0]) for x in lists[1:])), active)

    def _access(
        self, place: str, aligned: int, offset: int, active: np.ndarray, shared: bool, value: Lanes | None = None
    ) -> Lanes:
        """The byte at [register + number] and offset of each active thread, read or written."""
        name, _, more = place.strip("[]").partition("+")
        at = (self._value(name) + np.uint64(more or 0)).astype(np.int64)[active]
        memory, valid = (self.shared if shared else self.memory), self._valid[shared]
        assert not (at % aligned).any(), f"{place}: not aligned to {aligned} bytes"
        assert valid[at + offset].all(), f"{place}: outside of the arrays given"
        result = np.zeros(self._threads, np.uint64)
        if value is None:
            result[active] = memory[at + offset]
        else:
            memory[at + offset] = value[active].astype(np.uint8)
        return result


def run_ptx(text: str, word: np.ndarray) -> list[np.ndarray]:
    """What the assembly makes of 32-bit words ($4): the registers $0 to $3."""
    registers = Machine([]).run(text, [0, 0, 0, 0, word.ravel()], threads=word.size)
    return [registers[f"${i}"].astype(np.uint32).reshape(word.shape) for i in range(4)]


def launched(
    text: str, operands: Sequence[Any], out: Any, *, grid: int, warps: int, shared: int, name: str
) -> np.ndarray:
    """Stands for `pallas_kernels._ptx.launch`."""
    machine = Machine([np.asarray(x) for x in operands] + [np.zeros(out.shape, out.dtype)], shared)
    for block in range(grid):
        machine.run(text, [*machine.addresses, *[0] * bool(shared)], threads=32 * warps, block=block)
    count = int(np.prod(out.shape)) * np.dtype(out.dtype).itemsize
    return machine.memory[machine.addresses[-1] :][:count].view(out.dtype).reshape(out.shape)
