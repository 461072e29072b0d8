"""Work on host arrays by all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def on_all_cores(work: Callable[[T], object], parts: Sequence[T]) -> None:
    """Call `work` for every part, in any order, on as many threads as there are cores to run on.

    NumPy lets other threads run during its loops; parts should be large enough that little else is done.

    Raises:
        What `work` raises for the first part that it fails for.
    """
    if len(parts) == 1:
        work(parts[0])
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(work, parts):
            pass
