"""How long a call keeps the device busy.

Calls are queued behind each other on input sets that together exceed the cache; what writes over its inputs gets a set
for each call. A call's time is that of its kernels and copies, as JAX's profiler saw them on the device: the gaps in
which the host prepares the next launch are left out, for they belong to the program around a call. Where the profiler
sees no device, as on a CPU, the host's clock is read. Inputs are random: zeros run faster than data.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Products through cuBLAS, as in jaxtune's step: searching Triton's tilings as well takes minutes for all cases.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# Between rounds the device is waited for; each round begins with the device idle, as its first calls do.
ROUNDS = 3
WARM_UP = 2
_MEASURED_US, _LEAST_CALLS, _MOST_CALLS = 30000.0, 9, 60
_CACHE_BYTES, _UNKNOWN_MEMORY_BYTES = 200e6, 24e9

Interval = tuple[float, float]


class Plan(NamedTuple):
    """How many calls are timed, and how many input sets they are given."""

    calls: int
    sets: int


class Timing(NamedTuple):
    """Microseconds of one call: the median, and the distance between the quartiles; and what clock they are of."""

    us: float
    spread_us: float
    clock: str


def plan(floor_us: float, input_bytes: int, in_place: bool) -> Plan:
    """For a call that takes at least `floor_us`; its input sets fill a sixth of the device's memory at most."""
    calls = min(max(math.ceil(_MEASURED_US / max(floor_us, 1.0)), _LEAST_CALLS), _MOST_CALLS)
    fitting = max(int(_memory_bytes() / 6 // max(input_bytes, 1)), 1)
    if in_place:
        calls = min(calls, max(fitting - WARM_UP, ROUNDS))
    calls = max(calls // ROUNDS, 1) * ROUNDS
    wanted = calls + WARM_UP if in_place else math.ceil(_CACHE_BYTES / max(input_bytes, 1))
    return Plan(calls, wanted if in_place else max(1, min(wanted, fitting, calls)))


def measure(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], calls: int) -> Timing:
    """Time run(*inputs), taking the sets in turn; with as many sets as calls and warm-ups each is used once."""
    order = (sets[i % len(sets)] for i in range(WARM_UP + calls))
    for _ in range(WARM_UP):
        jax.block_until_ready(run(*next(order)))
    by_host = []
    with tempfile.TemporaryDirectory() as directory:
        with device_trace(directory):
            for _ in range(ROUNDS):
                start = time.perf_counter()
                for _ in range(calls // ROUNDS):
                    results = run(*next(order))
                jax.block_until_ready(results)
                by_host.append((time.perf_counter() - start) / (calls // ROUNDS) * 1e6)
        intervals = device_intervals(Path(directory))
    times = busy_us(intervals, calls) if intervals else by_host
    spread = 0.0
    if len(times) > 1:
        quartiles = statistics.quantiles(times, n=4)
        spread = quartiles[2] - quartiles[0]
    return Timing(statistics.median(times), spread, "device" if intervals else "host")


def device_trace(directory: str) -> contextlib.AbstractContextManager[None]:
    """JAX's profiler, of the device alone: neither the host's calls nor programs are recorded, which takes minutes for
    large ones."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    options.enable_hlo_proto = False
    return jax.profiler.trace(directory, profiler_options=options)


def device_intervals(directory: Path) -> list[Interval]:
    """(begin, end) in nanoseconds of each kernel and copy in a trace, in the order in which they began."""
    return sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for trace in directory.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    )


def busy_us(intervals: Sequence[Interval], calls: int) -> list[float]:
    """Microseconds that the device was busy in each of these equal calls; the mean alone where they were not equal."""
    if len(intervals) % calls:
        return [_covered(intervals) / calls / 1e3]
    each = len(intervals) // calls
    return [_covered(intervals[i : i + each]) / 1e3 for i in range(0, len(intervals), each)]


def _covered(intervals: Sequence[Interval]) -> float:
    """What the intervals, sorted, cover together: kernels of two streams may overlap."""
    total, reached = 0.0, -math.inf
    for begin, end in intervals:
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def _memory_bytes() -> float:
    statistics_of_device = jax.local_devices()[0].memory_stats() or {}
    return statistics_of_device.get("bytes_limit", _UNKNOWN_MEMORY_BYTES)


def ceilings() -> tuple[float, float]:
    """Bytes and bf16 operations a second that this GPU reaches in a copy of 1 GiB, of 2 or 4 bytes an element, and in a
    product of 8,192^3."""
    n = 8192
    keys = jax.random.split(jax.random.key(1), 3)
    big, a, b = (jax.random.normal(key, (rows * n, n), jnp.bfloat16) for key, rows in zip(keys, (8, 1, 1), strict=True))
    # How XLA cuts a copy into threads depends on its dtype; the GPU is as fast as the faster one.
    copies = [big, jax.lax.bitcast_convert_type(big.reshape(-1, n, 2), jnp.uint32)]
    copied = [measure(jax.jit(lambda x: ~x if x.dtype == jnp.uint32 else -x), [(x,)], 30).us for x in copies]
    product = measure(jax.jit(lambda a, b: a @ b.T, compiler_options=OPTIONS), [(a, b)], 30)
    return 2e6 * big.nbytes / min(copied), 2e6 * n**3 / product.us
