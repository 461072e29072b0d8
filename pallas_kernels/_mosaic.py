"""What all kernels through Pallas' Mosaic backend share."""

from __future__ import annotations

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._device import compute_capability
from pallas_kernels._triton import interpreting


def hopper_reason(*, interpretable: bool = False) -> str | None:
    """Why a kernel for Hopper cannot run here, or None. interpretable: whether JAX's GPU interpreter runs it."""
    if not hasattr(plgpu, "inline_mgpu") or jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or newer, this is {jax.__version__}"
    if interpreting():
        return None if interpretable else "the interpreter does not run assembly"
    capability = compute_capability()
    if capability is None or not 9.0 <= capability < 10.0:
        return "it needs a Hopper GPU (compute capability 9.0)"
    return None
