"""Runs of several processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_processes(
    arguments: Sequence[str], processes: int, logs: Path, *, devices: int = 1
) -> list[subprocess.Popen[bytes]]:
    """Start `python -m jaxtune.train` as many times, each with its own CPU devices; what it says goes to LOGS/I.txt."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XLA_", "JAX_"))}
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HOME": str(logs / "hf"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]),
        # What these programs take is compiled, not computed.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        f"--xla_force_host_platform_device_count={devices}",
    }
    address = f"127.0.0.1:{free_port()}"
    started = []
    for number in range(processes):
        joined = ["--coordinator", address, "--processes", str(processes), "--process-id", str(number)]
        command = [sys.executable, "-m", "jaxtune.train", *arguments, *joined]
        with (logs / f"{number}.txt").open("wb") as log:
            started.append(
                subprocess.Popen(command, env=kept | settings, cwd=logs, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def logs_of(logs: Path, processes: int) -> list[str]:
    return [(logs / f"{number}.txt").read_text(errors="replace") for number in range(processes)]
