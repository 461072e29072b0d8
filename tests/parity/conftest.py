"""What all tests against torch need."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
import torch


@pytest.fixture(autouse=True)
def torch_on_one_thread_without_compiler() -> Iterator[None]:
    """Keep the oracles fast on small tensors and busy machines.

    With two threads, each product waits about 10 ms for the second one where another process has its core. And
    bitsandbytes' generic code would be compiled anew for each shape.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Modules share no shapes, and programs of hundreds of tests would take more memory than the real model."""
    yield
    jax.clear_caches()
