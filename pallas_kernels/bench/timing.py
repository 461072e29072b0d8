"""How long a call takes on the device.

Calls are laid behind each other in one program, each tied to the one before, on input sets that together exceed the
cache; programs are sent one behind the other, so that the host is not waited for. What writes over its inputs gets
fresh ones for each repeat. Inputs are random: zeros run faster than data.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

REPEATS = 7
_CACHE_BYTES, _SETS_BYTES, _RESULTS_BYTES = 200e6, 8e9, 3e9
_PROGRAM_US, _IN_PLACE_PROGRAM_US, _REPEAT_US, _MOST_CALLS = 1500.0, 5000.0, 10000.0, 16


def plan(floor_us: float, input_bytes: int, result_bytes: int, in_place: bool) -> tuple[int, int]:
    """(calls of a program, input sets) for a call that takes at least `floor_us`."""
    wanted = math.ceil((_IN_PLACE_PROGRAM_US if in_place else _PROGRAM_US) / max(floor_us, 1.0))
    fitting = _MOST_CALLS if in_place else int(_RESULTS_BYTES // max(result_bytes, 1))
    calls = max(1, min(wanted, fitting, _MOST_CALLS))
    sets = calls if in_place else math.ceil(_CACHE_BYTES / max(input_bytes, 1))
    return calls, max(1, min(sets, calls, int(_SETS_BYTES // max(input_bytes, 1))))


def program(f: Callable[..., Any], calls: int, feed: Callable[[Any, Any], Any] | None) -> Callable[[list[Any]], Any]:
    """A function of the input sets that calls f(*inputs) `calls` times, and gives all results; or with `feed` the
    input sets that they became."""

    # One function of the program, however often it is called: it is lowered once.
    f = jax.jit(f)

    def run(sets: list[Any]) -> Any:
        sets = list(sets)
        results: list[Any] = []
        for i in range(calls):
            inputs = sets[i % len(sets)]
            if results:
                # Otherwise XLA may merge the loops of several calls, or leave out a call it has seen.
                inputs, results[-1] = lax.optimization_barrier((inputs, results[-1]))
            results.append(f(*inputs))
            if feed is not None:
                sets[i % len(sets)] = feed(inputs, results.pop())
        return results if feed is None else sets

    return run


def measure(
    run: Callable[[Any], Any], make_sets: Callable[[], Any], calls: int, floor_us: float, in_place: bool
) -> tuple[float, float]:
    """Microseconds of one call: the median over repeats, and the distance between the quartiles."""
    sets = make_sets()
    results = jax.block_until_ready(run(sets))
    programs = 1 if in_place else max(2, min(50, math.ceil(_REPEAT_US / (calls * max(floor_us, 1.0)))))
    times = []
    for _ in range(REPEATS):
        del results
        if in_place:
            sets = jax.block_until_ready(make_sets())
        start = time.perf_counter()
        for _ in range(programs):
            results = run(sets)
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / (programs * calls) * 1e6)
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), quartiles[2] - quartiles[0]


def ceilings() -> tuple[float, float]:
    """Bytes and bf16 operations a second that this GPU reaches in a copy of 1 GiB and in a product of 8,192^3."""

    def seconds(f: Callable[..., Any], inputs: tuple[Any, ...], calls: int) -> float:
        run = jax.jit(program(lambda *arrays: f(*arrays), calls, None))
        return measure(run, lambda: [inputs], calls, 500.0, False)[0] / 1e6

    n = 8192
    keys = jax.random.split(jax.random.key(1), 3)
    big, a, b = (jax.random.normal(key, (rows * n, n), jnp.bfloat16) for key, rows in zip(keys, (8, 1, 1), strict=True))
    return 2 * big.nbytes / seconds(lambda x: -x, (big,), 2), 2.0 * n**3 / seconds(lambda a, b: a @ b.T, (a, b), 4)
