"""What a run depends on beside its configuration: versions, driver, device."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

PACKAGES = (
    *("jaxtune", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint"),
    *("transformers", "datasets", "numpy"),
)


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that matter and are installed, and of the GPU's driver."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = nvidia_smi("driver_version")
    return found if driver is None else found | {"driver": driver}


def nvidia_smi(field: str, gpu: str | None = None) -> str | None:
    """What the driver's tool says of a GPU (the first, or the one of this index or UUID); None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *(["-i", gpu] if gpu else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 and lines[0].strip() else None
