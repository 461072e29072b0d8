"""Data sheets of common GPUs, and the device at hand as such a sheet: what a plan is made for."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

import jax

from jaxtune.config_checks import parse_bytes
from jaxtune.errors import UserError

# What CUDA, cuBLAS, cuDNN and the compiled programs hold beside JAX's allocator. An allowance, not a measurement.
CONTEXT_BYTES = 768 * 2**20


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    name: short, as users write it. kind: as its driver reports it. memory: bytes in all; of the host where the two
    share one. bandwidth: bytes a second of that memory. flops: dense 16-bit matrix products with float32 accumulation,
    a second. capability: CUDA's compute capability, None for a CPU. host_bandwidth: bytes a second to and from the
    host's memory, one way. shared: its memory is the host's. allocator: bytes that JAX's allocator may take; None where
    that is memory less CONTEXT_BYTES.
    """

    name: str
    kind: str
    memory: int
    bandwidth: float
    flops: float
    capability: float | None
    host_bandwidth: float
    shared: bool = False
    allocator: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that weights, state and one step may take together."""
        if self.allocator is not None:
            return self.allocator
        return self.memory - (CONTEXT_BYTES if self.capability is not None else 0)

    def limited(self, limit: str | None) -> Device:
        """The device to a run with this `train.memory_limit`."""
        if limit is None:
            return self
        most = parse_bytes("train.memory_limit", limit) - (CONTEXT_BYTES if self.capability is not None else 0)
        return dataclasses.replace(self, allocator=min(self.usable, max(0, most)))

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies 8-bit floating-point matrices (Ada, Hopper and newer)."""
        return self.capability is not None and self.capability >= 8.9

    @property
    def compute_dtype(self) -> str:
        """What `model.dtype: auto` means there."""
        return "fp32" if self.capability is None else "bf16" if self.capability >= 8.0 else "fp16"


def _sheet(
    name: str, kind: str, mebibytes: int, gigabytes_s: float, teraflops: float, capability: float, host_gb_s: float
) -> Device:
    rates = gigabytes_s * 1e9, teraflops * 1e12
    return Device(name, kind, mebibytes * 2**20, *rates, capability, host_gb_s * 1e9, shared=kind == "Orin")


# Memory as nvidia-smi totals it; bandwidth and dense rates from the makers' data sheets (of GeForce cards the rate with
# float32 accumulation, which is half of the one with float16). Host bandwidth: PCIe 3 x16 13, PCIe 4 x16 25, PCIe 5 x16
# 51 GB/s as measured on an H200; a Jetson's memory is the host's own.
SHEETS = {
    sheet.name: sheet
    for sheet in (
        _sheet("jetson-orin", "Orin", 62840, 204.8, 42.5, 8.7, 204.8),
        _sheet("t4", "Tesla T4", 15360, 320, 65, 7.5, 13),
        _sheet("v100", "Tesla V100-SXM2-16GB", 16384, 900, 125, 7.0, 13),
        _sheet("rtx-3090", "NVIDIA GeForce RTX 3090", 24576, 936, 71, 8.6, 25),
        _sheet("rtx-4090", "NVIDIA GeForce RTX 4090", 24564, 1008, 165, 8.9, 25),
        _sheet("rtx-5090", "NVIDIA GeForce RTX 5090", 32607, 1792, 209, 12.0, 51),
        _sheet("a100-40", "NVIDIA A100-SXM4-40GB", 40960, 1555, 312, 8.0, 25),
        _sheet("a100-80", "NVIDIA A100-SXM4-80GB", 81920, 2039, 312, 8.0, 25),
        _sheet("h100", "NVIDIA H100 80GB HBM3", 81559, 3350, 989, 9.0, 51),
        _sheet("h200", "NVIDIA H200", 143771, 4800, 989, 9.0, 51),
        _sheet("b200", "NVIDIA B200", 183359, 8000, 2250, 10.0, 51),
    )
}
_OTHER_NAMES = {"jetson": "jetson-orin"}


def sheet(name: str) -> Device:
    """The data sheet of a device by its short name, in any case.

    Raises:
        UserError: no such sheet; the text lists those there are.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = _OTHER_NAMES.get(key, key)
    if key not in SHEETS:
        near = difflib.get_close_matches(key, SHEETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--device {name!r} has no data sheet here; known are {', '.join(SHEETS)}{hint}")
    return SHEETS[key]


def this_device() -> Device:
    """The first device of this process, which this starts; its rates from the sheet of its kind where there is one.

    Rates of what has no sheet are taken from the sheet of the same or the next older compute capability, and of a CPU
    they are those of a small server: enough for an estimate that is labelled as one.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return Device("cpu", device.device_kind, host_memory(), 20e9, 0.1e12, None, 10e9, shared=True)
    stats = device.memory_stats() or {}
    capability = float(getattr(device, "compute_capability", None) or 0.0)
    same = [known for known in SHEETS.values() if known.kind == device.device_kind]
    older = [known for known in SHEETS.values() if (known.capability or 0.0) <= capability]
    nearest = same[0] if same else max(older, key=lambda known: known.capability or 0.0, default=SHEETS["v100"])
    return dataclasses.replace(
        nearest,
        name=nearest.name if same else device.device_kind,
        kind=device.device_kind,
        memory=nearest.memory if same else stats.get("bytes_limit", nearest.memory) + CONTEXT_BYTES,
        capability=capability or nearest.capability,
        allocator=stats.get("bytes_limit"),
    )


def host_memory() -> int:
    """Bytes of the host's memory, or of the share of it that the system's control group allows."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total = int(fields["MemTotal"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
