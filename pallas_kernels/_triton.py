"""What all Pallas kernels that go through Triton share."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._device import compute_capability

# Operands that a kernel addresses itself; BlockSpecs must have sizes that are powers of two.
WHOLE = pl.BlockSpec(memory_space=pl.ANY)
_DTYPES = ("bfloat16", "float16", "float32")

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


def interpreting() -> bool:
    """Whether kernels run in the interpreter here."""
    return _interpret.get()


def gpu_reason() -> str | None:
    """Why kernels through Triton cannot run on the default device, or None."""
    if interpreting():
        return None
    capability = compute_capability()
    if capability is None:
        return "it needs an NVIDIA GPU"
    if capability < 8.0:
        return f"it needs compute capability 8.0 or newer (Ampere), this GPU has {capability}"
    return None


def row_kernel_reason(*arrays: Array) -> str | None:
    """Why kernels that compute on rows of these arrays in float32 cannot run, or None."""
    for array in arrays:
        if array.dtype.name not in _DTYPES:
            return f"it computes on {', '.join(_DTYPES)}, not {array.dtype.name}"
        if array.size == 0:
            return f"an array of shape {array.shape} holds nothing"
    return gpu_reason()


def masked_span(start: int, size: int, traced: Array) -> Any:
    """`size` elements from `start` on, some of which lie outside and are to be masked; `traced` is any index.

    JAX refuses a slice that it can see to be out of bounds, masked or not; Triton folds the product away.
    """
    return pl.ds(traced * 0 + start, size)


def load_f32(at: Any, inside: Array | None = None) -> Array:
    """What a reference points at, in float32, with zeros where a lane is not `inside`."""
    other = None if inside is None else 0.0
    return plt.load(at, mask=inside, other=other).astype(jnp.float32)


def triton_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 1, **arguments: Any
) -> Callable[..., Any]:
    """`pl.pallas_call` through Triton, or in the interpreter where `interpreted` says so."""
    parameters = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=interpreting(), **arguments)
