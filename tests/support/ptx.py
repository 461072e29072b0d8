"""The few PTX instructions that table look-ups are made of, in NumPy."""

from __future__ import annotations

import re

import numpy as np


def run_ptx(text: str, word: np.ndarray) -> list[np.ndarray]:
    """What the assembly makes of 32-bit words: the registers $0 to $3."""
    registers: dict[str, np.ndarray] = {"$4": word.astype(np.uint64)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint64(int(name, 16 if name.startswith("0x") else 10))

    for line in re.findall(r"^(\w+)\.b32 (.*);$|^(\w+)\.u32 (.*);$", text, flags=re.M):
        operation, operands = (line[0], line[1]) if line[0] else (line[2], line[3])
        out, *names = (name.strip() for name in operands.split(","))
        a, b, *rest = (value(name) for name in names)
        if operation == "prmt":
            both = a | b << np.uint64(32)
            picked = [
                both >> (rest[0] >> np.uint64(4 * i) & np.uint64(7)) * np.uint64(8) & np.uint64(255) for i in range(4)
            ]
            registers[out] = sum(byte << np.uint64(8 * i) for i, byte in enumerate(picked)) + 0 * word
        else:
            registers[out] = {"and": a & b, "or": a | b, "shr": a >> b}[operation]
    return [registers[f"${i}"].astype(np.uint32) for i in range(4)]
