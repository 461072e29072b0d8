"""Kernels written as PTX, launched through Pallas' Mosaic backend.

Why it exists: some of what a kernel for Hopper is made of (products of one warp, tables in shared memory, shuffles, a
copy of 8 bytes for each thread) Pallas has no words for. A `Program` collects instructions, `launch` makes them the
body of a Mosaic kernel. Being text, it can be run by an interpreter where there is no GPU (tests/support/ptx.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

WARPGROUP = 4
EVERY_LANE = "0xffffffff"


class Program:
    """Instructions in order; registers are made as they are needed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._registers: dict[str, list[str]] = {}

    def register(self, kind: str = "b32") -> str:
        """A new register."""
        made = self._registers.setdefault(kind, [])
        made.append(f"{kind}_{len(made)}")
        return made[-1]

    def registers(self, count: int) -> list[str]:
        """New registers of 32 bits."""
        return [self.register() for _ in range(count)]

    def do(self, operation: str, *operands: Any, when: str | None = None) -> None:
        """One instruction, for lanes where the predicate `when` holds; a list is a vector of registers."""
        texts = [f"{{{', '.join(x)}}}" if isinstance(x, list) else str(x) for x in operands]
        self.lines.append(f"{f'@{when} ' if when else ''}{operation} {', '.join(texts)}".rstrip() + ";")

    def __call__(self, operation: str, *operands: Any, kind: str = "b32") -> str:
        """One instruction whose result is a new register."""
        result = self.register(kind)
        self.do(operation, result, *operands)
        return result

    def test(self, comparison: str, a: Any, b: Any) -> str:
        """A predicate: a compared with b, without sign."""
        return self(f"setp.{comparison}.u32", a, b, kind="pred")

    def address(self, index: Any, size: int, base: str) -> str:
        """64 bits: base + index * size."""
        return self("mad.wide.u32", index, size, base, kind="b64")

    def label(self, name: str) -> None:
        """A place to branch to."""
        self.lines.append(f"{name}:")

    def text(self) -> str:
        """The program as one block."""
        declared = [f".reg .{kind} {', '.join(names)};" for kind, names in self._registers.items()]
        return "\n".join(["{", *declared, *self.lines, "}"])


def launch(
    text: str, operands: Sequence[Array], out: jax.ShapeDtypeStruct, *, grid: int, warps: int, shared: int, name: str
) -> Array:
    """Run a program on `grid` blocks of `warps` warps: $0 and on are the addresses of the operands, then of the result,
    then, in 32 bits, of `shared` bytes of shared memory."""
    last = len(operands) + 1

    def kernel(*refs: Any) -> None:
        # Not more than these: barriers and such may follow.
        refs = refs[: last + bool(shared)]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(_: Any, *memory: Any) -> tuple[()]:
            addresses = [mgpu.utils.memref_ptr(ref) for ref in memory]
            if shared:
                addresses[last] = llvm.ptrtoint(ir.IntegerType.get_signless(32), addresses[last])
            constraints = ",".join(["l"] * last + ["r"] * bool(shared) + ["~{memory}"])
            llvm.inline_asm(ir.Type.parse("!llvm.void"), addresses, text, constraints, has_side_effects=True)
            return ()

        run(*refs)

    threads: dict[str, Any] = (
        {"num_threads": warps // WARPGROUP, "thread_name": "warpgroup"} if warps > WARPGROUP else {}
    )
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(grid,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(),
        scratch_types=[plgpu.SMEM((shared,), jnp.int8)] if shared else [],
        **threads,
    )(*operands)
