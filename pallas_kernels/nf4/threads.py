"""Work on host arrays by all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# More would hold their temporaries and wait for each other.
_MOST_THREADS = 32


def on_all_cores(work: Callable[[T], object], parts: Sequence[T]) -> None:
    """Call `work` for every part, in any order, on as many threads as there are cores to run on, up to 32.

    NumPy lets other threads run during its loops; parts should be large enough that little else is done.

    Raises:
        What `work` raises for the first part that it fails for.
    """
    if len(parts) == 1:
        work(parts[0])
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, _MOST_THREADS)) as pool:
        for _ in pool.map(work, parts):
            pass
