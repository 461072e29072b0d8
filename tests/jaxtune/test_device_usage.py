"""What a process holds of a GPU: the allocator's counts, and the driver's through a stand-in for its library."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxtune import device_usage as usage

STATS = {"bytes_in_use": 3, "peak_bytes_in_use": 5, "pool_bytes": 8, "bytes_limit": 100}


class Driver:
    """Two GPUs; on the one that is asked for, this process and another."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.asked: list[Any] = []

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        return name

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        self.asked.append(handle)
        return [SimpleNamespace(pid=1, usedGpuMemory=7), SimpleNamespace(pid=os.getpid(), usedGpuMemory=9)]


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpu = SimpleNamespace(platform="gpu", local_hardware_id=1, memory_stats=lambda: STATS)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    usage._nvml.cache_clear()
    yield
    usage._nvml.cache_clear()


@pytest.mark.parametrize(("visible", "asked"), [(None, 1), ("1,0", 0), ("GPU-a,GPU-b", "GPU-b"), ("5,6", None)])
def test_of_the_device_that_the_process_uses(monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver := Driver())
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    counted = {"device_bytes": 5, "allocated_bytes": 3, "reserved_bytes": 8}
    assert usage.device_usage() == (counted if asked is None else counted | {"process_bytes": 9})
    assert driver.asked == ([] if asked is None else [asked])


@pytest.mark.parametrize("module", [None, Driver(broken=True)])
def test_without_the_driver(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert "process_bytes" not in usage.device_usage()


def test_a_cpu_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = SimpleNamespace(platform="cpu", local_hardware_id=0, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [cpu])
    assert usage.device_usage() == {}
