"""What a run does at its start before the weights are there, or while a thread loads them: the step, from shapes."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import jax

from jaxtune.compile_cache import mark_compiled, was_compiled
from jaxtune.config import TrainConfig
from jaxtune.metrics import Progress
from jaxtune.step import StepConfig


class Beside:
    """A function called by a thread, beside what the caller does. Use as a context manager, which ends the thread.

    The function is given one to call now and then, which raises once the context has been left.
    """

    def __init__(self, work: Callable[[Callable[..., None]], Any]) -> None:
        self._left = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        # The caller's context variables hold in the thread, too.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._call, work), name="jaxtune-beside", daemon=True)

    def _call(self, work: Callable[[Callable[..., None]], Any]) -> None:
        try:
            self._result = work(self._check)
        except BaseException as error:  # noqa: BLE001 - it is raised again by whoever takes the result
            self._error = error

    def _check(self, *_: Any) -> None:
        if self._left.is_set():
            raise InterruptedError("not needed any more")

    def result(self) -> Any:
        """What the function returned, or raised, once it has."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()


class Step:
    """The train step with one policy, traced and compiled once.

    config: what it was made with. arguments: arrays, or their shapes.
    """

    def __init__(
        self, jitted: Any, config: StepConfig, train: TrainConfig, arguments: tuple[Any, ...], progress: Progress
    ) -> None:
        self.config = config
        self._arguments = _described(arguments)
        self._program = config, train, self._arguments
        self._progress = progress
        self._lower = partial(jitted.lower, *arguments)
        self._compiled: jax.stages.Compiled | None = None

    def is_cached(self) -> bool:
        """Whether the compile cache has it, as far as is known."""
        return was_compiled(self._program)

    def takes(self, *arguments: Any) -> bool:
        """Whether it is the step of these arguments."""
        return self._arguments == _described(arguments)

    def compile(self) -> jax.stages.Compiled:
        """The program, compiled on the first call."""
        if self._compiled is None:
            with self._progress.phase("trace the step"):
                lowered = self._lower()
            with self._progress.phase("compile the step"):
                self._compiled = lowered.compile()
            mark_compiled(self._program)
            # It holds the arguments, which may be the model.
            del self._lower
        return self._compiled


def _described(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, str(leaf.dtype), leaf.sharding) for leaf in leaves]
