"""Lines that tell how far something long has come; nothing is shown of what is done within two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

import numpy as np


class Progress:
    """Counts tensors and bytes against a known total."""

    def __init__(
        self, what: str, total: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """what: shown before the numbers. total: tensors. stream: standard error by default. clock: seconds."""
        self._what, self._total, self._clock = what, total, clock
        self._stream = stream or sys.stderr
        self._started = clock()
        # A terminal's line is redrawn; a log gets few lines.
        self._terminal = self._stream.isatty()
        self._interval = 0.5 if self._terminal else 10.0
        self._due = self._started + 2.0
        self._shown = False
        self._done = self._bytes = 0

    def watch(self, read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """`read`, counting what it gives."""

        def counted(name: str) -> np.ndarray:
            tensor = read(name)
            self.step(tensor.nbytes)
            return tensor

        return counted

    def step(self, nbytes: int) -> None:
        """One more tensor is done, of this many bytes."""
        self._done, self._bytes = self._done + 1, self._bytes + nbytes
        now = self._clock()
        if now >= self._due or (self._shown and self._done == self._total):
            self._due, self._shown = now + self._interval, True
            seconds = now - self._started
            rate = self._bytes / 1e6 / max(seconds, 1e-9)
            text = f"{self._what}: {self._done} of {self._total} tensors, {seconds:.0f} s, {rate:.0f} MB/s"
            last = self._done == self._total
            self._stream.write(f"\r{text}" + ("\n" if last else "") if self._terminal else text + "\n")
            self._stream.flush()
