"""What GPU a program is traced for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

# The GPU that `lower_for_cuda` stands for.
_MULTIPROCESSORS = 132
_H200 = AbstractDevice("NVIDIA H200", num_cores=_MULTIPROCESSORS, platform="gpu")
_CAPABILITIES = {"NVIDIA H200": 9.0}
# What `assume_capability` says, in a tuple of one; None where it says nothing.
_assumed: contextvars.ContextVar[tuple[float | None] | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def assume_capability(capability: float | None) -> Iterator[None]:
    """Choose implementations as on a GPU of this compute capability, or with None as on a machine without one.

    For tracing, to see what another device would run; and for running with None, where the default device is a CPU.
    What was traced before keeps its choices, so JAX's caches are cleared on both ends.
    """
    token = _assumed.set((capability,))
    jax.clear_caches()
    try:
        yield
    finally:
        _assumed.reset(token)
        jax.clear_caches()


def compute_capability() -> float | None:
    """The compute capability of the GPU at hand, such as 9.0, or None where it is no NVIDIA GPU.

    It is that of the default device; within `assume_capability` the one assumed; within `lower_for_cuda`, on a machine
    without a GPU, that of the one it stands for.
    """
    if (assumed := _assumed.get()) is not None:
        return assumed[0]
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        target = jax.sharding.get_abstract_mesh().abstract_device
        return None if target is None else _CAPABILITIES.get(target.device_kind)
    capability = getattr(device, "compute_capability", None)
    return float(capability) if capability else None


def multiprocessors() -> int:
    """How many the GPU at hand has; without one, those of the one that `lower_for_cuda` stands for."""
    device = jax.local_devices()[0]
    return getattr(device, "core_count", _MULTIPROCESSORS) if device.platform == "gpu" else _MULTIPROCESSORS


def lower_for_cuda(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> str:
    """The program that `function` of arrays (or their shapes) becomes on an H200, as StableHLO; needs no GPU.

    A kernel that uses what its backend cannot lower, or more shared memory than there is, raises here.
    """
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=_H200)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *args: function(*args), donate_argnums=donate).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
