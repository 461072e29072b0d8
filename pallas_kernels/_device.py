"""What GPU a program is traced for."""

from __future__ import annotations

import jax


def compute_capability() -> float | None:
    """The compute capability of the default device, such as 9.0, or None where it is no NVIDIA GPU."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return float(capability) if device.platform == "gpu" and capability else None
