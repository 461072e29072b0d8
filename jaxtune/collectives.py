"""What a step sends between devices, read from its program before it is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.interpreters import partial_eval

_OPS = {
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a step.

    op: all-gather, reduce-scatter, all-reduce or all-to-all. axes: of the mesh, those that exchange. dtype: of what
    they exchange. elements: of the whole array that is gathered, scattered, added up or exchanged, on one device.
    times: how often in a step.
    """

    op: str
    axes: tuple[str, ...]
    dtype: str
    elements: int
    times: int

    def sent(self, sizes: Mapping[str, int]) -> float:
        """Bytes that each device sends for it in a step, by ring algorithms; `sizes`: devices along each axis."""
        n = math.prod(sizes[axis] for axis in self.axes)
        passes = 2 if self.op == "all-reduce" else 1
        return passes * (n - 1) / n * self.elements * np.dtype(self.dtype).itemsize * self.times


def collectives(traced: Any, chunks: int = 1) -> list[Collective]:
    """The exchanges of a step, in the order of its program, equal ones counted together.

    traced: what `jax.jit(step).trace(...)` gives. chunks: how often the loop over the loss's chunks goes round, which
    depends on how much is learnt.
    """
    found: dict[Collective, int] = {}
    # Without what nothing needs, as XLA compiles it: of a layer that is computed again, the sum at its end.
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars))
    for each, times in _walk(jaxpr, 1, chunks):
        found[each] = found.get(each, 0) + times
    return [dataclasses.replace(each, times=times) for each, times in found.items()]


def _walk(jaxpr: Any, times: int, chunks: int) -> Iterator[tuple[Collective, int]]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _OPS:
            axes = params["axes"] if "axes" in params else params["axis_name"]
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            for into, out in zip(equation.invars, equation.outvars):
                whole = max(into.aval.size, out.aval.size)
                yield Collective(_OPS[name], axes, into.aval.dtype.name, whole, 0), times
            continue
        around = times * {"scan": params.get("length", 1), "while": chunks}.get(name, 1)
        for inner in _inner(params):
            yield from _walk(inner, around, chunks)


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each
