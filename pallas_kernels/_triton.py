"""What all Pallas kernels that go through Triton share."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._device import compute_capability

_interpret = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it kernels run in Pallas' interpreter, on any device: for tests and for checking a variant without a GPU.

    Functions that were traced by `jax.jit` outside of it keep what they were traced with.
    """
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def gpu_reason() -> str | None:
    """Why kernels through Triton cannot run on the default device, or None."""
    if _interpret.get():
        return None
    capability = compute_capability()
    if capability is None:
        return "it needs an NVIDIA GPU"
    if capability < 8.0:
        return f"it needs compute capability 8.0 or newer (Ampere), this GPU has {capability}"
    return None


def triton_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 1, **arguments: Any
) -> Callable[..., Any]:
    """`pl.pallas_call` through Triton, or in the interpreter where `interpreted` says so."""
    parameters = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=_interpret.get(), **arguments)
