"""Programs that are compiled once and found again by the next process (`output.compile_cache`)."""

from __future__ import annotations

from pathlib import Path

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
