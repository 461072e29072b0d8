"""What a process holds of its GPU: as JAX's allocator counts it, and as the driver does (nvidia-smi's figure)."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtune.memory import IN_STEP
from jaxtune.planning import Plan


def device_usage() -> dict[str, int]:
    """Bytes of the first device, by name, as far as they are counted; nothing of a CPU.

    device_bytes: the most that has been allocated. allocated_bytes: what is allocated now. reserved_bytes: what the
    allocator has taken from the driver. process_bytes: what the driver counts for this process, which is that and
    CUDA's context, libraries and programs; only with the package nvidia-ml-py (in jaxtune[cuda13] and jaxtune[cuda12]),
    and not where a container hides its processes from the driver.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    names = {"device_bytes": "peak_bytes_in_use", "allocated_bytes": "bytes_in_use", "reserved_bytes": "pool_bytes"}
    found = {ours: stats[theirs] for ours, theirs in names.items() if theirs in stats}
    driver = process_bytes(device.local_hardware_id or 0) if device.platform == "gpu" else None
    return found if driver is None else found | {"process_bytes": driver}


def start_records(
    plan: Plan,
    policy: str,
    step: jax.stages.Compiled,
    memory: Mapping[str, int],
    usage: Mapping[str, Mapping[str, int]],
    phases: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """What metrics.jsonl tells of a run before its first update.

    The parts of a step as XLA has planned them: `step_argument_bytes` (weights, state and batch),
    `step_temporary_bytes` (all else, of which no moment is known: forward and backward pass are one program) and
    `step_host_bytes`. What the estimate makes of the moments inside is `planned_parts`.

    policy: of the step. memory: by component, as `first_that_fits` leaves it. usage: `device_usage` by moment. phases:
    seconds by name.
    """
    seconds = {name.replace(" ", "_") + "_seconds": value for name, value in phases.items()}
    yield {
        **seconds,
        "step_temporary_bytes": memory[IN_STEP],
        "frozen_bytes": memory["frozen weights"],
        "remat": policy,
    }
    estimate, analysis = plan.memory_of(policy), step.memory_analysis()
    assert analysis is not None
    yield {
        "planned_bytes": estimate.peak,
        "compiled_bytes": sum(memory.values()),
        "step_argument_bytes": analysis.argument_size_in_bytes,
        "step_host_bytes": analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes,
        "planned_parts": estimate.parts,
    }
    yield from ({"moment": moment, **counted} for moment, counted in usage.items() if counted)


def process_bytes(ordinal: int) -> int | None:
    """What the driver counts for this process on the GPU of this number among those it sees; None where it does not."""
    if (nvml := _nvml()) is None:
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[ordinal] if ordinal < len(visible) else str(ordinal)
    try:
        by_number = name.isdigit()
        handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else nvml.nvmlDeviceGetHandleByUUID(name)
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    own = (process.usedGpuMemory for process in processes if process.pid == os.getpid())
    return next(own, None)


@functools.cache
def _nvml() -> Any:
    """The driver's own library, ready to be asked; None where it or its package is missing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
