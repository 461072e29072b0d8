"""SIGINT and SIGTERM as requests to stop where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxtune.errors import Abandoned, Interrupted


class StopRequests:
    """While the context lasts, the first SIGINT or SIGTERM is noted in `received` and the second raises.

    Python takes signals in the main thread only: in another one nothing is caught, and they do what they did before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupted(self, received: int, step: int, total_steps: int) -> Interrupted:
        """What to raise for a signal, here or in another process, once everything up to `step` is saved."""
        number = signal.Signals(received)
        state = f"after step {step} of {total_steps}, which is saved" if step else "before the first update"
        return Interrupted(number, f"stopped by {number.name} {state}; the same command with --resume auto continues")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Abandoned(
                number,
                "stopped without saving, at the second signal; the same command with --resume auto goes on from the "
                "newest checkpoint",
            )
        self.received = signal.Signals(number)
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\n{self.received.name}: saving after this step; once more to stop without\n".encode())
