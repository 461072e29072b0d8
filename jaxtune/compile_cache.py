"""Programs that are compiled once and found again by the next process (`output.compile_cache`)."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import jax

# What `use_compile_cache` sets, for the whole process.
CONFIGURED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def use_compile_cache(directory: str) -> None:
    """Keep what this process compiles in the directory, and take from there what is in it already.

    Small programs too, which JAX would leave out: a run has dozens of them, and together they take seconds on a GPU.
    """
    values = str(Path(directory).expanduser()), 0.0
    for name, value in zip(CONFIGURED, values):
        jax.config.update(name, value)


def was_compiled(program: Any) -> bool:
    """Whether `mark_compiled` was told of this program in the cache in use. What is there may be of other code."""
    with contextlib.suppress(OSError):
        mark = _mark(program)
        return mark is not None and mark.exists()
    return False


def mark_compiled(program: Any) -> None:
    """Leave a mark in the cache in use, if one can be written, that it has this program: what its repr tells apart."""
    with contextlib.suppress(OSError):
        mark = _mark(program)
        if mark is not None and not mark.exists():
            mark.touch()


def _mark(program: Any) -> Path | None:
    directory = jax.config.values["jax_compilation_cache_dir"]
    if directory is None or not Path(directory).is_dir():
        return None
    text = repr((program, jax.local_devices()[0].device_kind, jax.__version__))
    return Path(directory) / f"jaxtune-{hashlib.sha256(text.encode()).hexdigest()}"
