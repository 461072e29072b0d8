"""Which implementation of an op runs, and why.

Each implementation module offers `unsupported_reason(...) -> str | None` for the arguments at hand; an op's api.py
passes those to `choose`. A named implementation runs or raises, it never falls back; the automatic choice is logged
once, with the reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """An automatic choice. implementation: what runs. refused: why not the better ones, by name."""

    op: str
    implementation: str
    refused: tuple[tuple[str, str], ...]


_Recorder = tuple[list[Choice], str | None]
_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def record_choices(trace_as: str | None = None) -> Iterator[list[Choice]]:
    """Gives a list that every automatic choice made inside is added to, in order; what is traced anew, chooses anew.

    trace_as: go on with this implementation, where an op has it, instead of the one chosen: for seeing what a device
    that is not here would run, when some of it cannot even be traced without the device's libraries.
    """
    choices: list[Choice] = []
    token = _recorder.set((choices, trace_as))
    try:
        yield choices
    finally:
        _recorder.reset(token)


def choose(op: str, implementation: str | None, candidates: Mapping[str, Callable[[], str | None]]) -> str:
    """Returns the name of the implementation to run.

    Args:
        op: the public name of the op, for messages.
        implementation: the name the caller asked for, or None for the best one that can run.
        candidates: name -> check, best first; a check returns None when that implementation can run, else why not.

    Raises:
        ValueError: `implementation` is no candidate's name.
        NotImplementedError: the named implementation, or with None every candidate, cannot run here; the text says why.
    """
    if implementation is None:
        refused: dict[str, str] = {}
        for name, unsupported_reason in candidates.items():
            reason = unsupported_reason()
            if reason is None:
                _log_once(f"{op}: using {name!r}" + (f" ({_reasons(refused)})" if refused else ""))
                return _recorded(Choice(op, name, tuple(refused.items())), candidates)
            refused[name] = reason
        raise NotImplementedError(f"{op}: no implementation can run here ({_reasons(refused)})")
    if implementation not in candidates:
        names = ", ".join(map(repr, candidates))
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; use one of {names}, or None to let {op} choose"
        )
    reason = candidates[implementation]()
    if reason is not None:
        raise NotImplementedError(f"{op}: implementation {implementation!r} cannot run: {reason}")
    return implementation


def _recorded(choice: Choice, candidates: Mapping[str, Callable[[], str | None]]) -> str:
    """The implementation to go on with."""
    if (recorder := _recorder.get()) is None:
        return choice.implementation
    choices, trace_as = recorder
    choices.append(choice)
    return trace_as if trace_as is not None and trace_as in candidates else choice.implementation


def _reasons(refused: Mapping[str, str]) -> str:
    return "; ".join(f"{name!r} cannot run: {reason}" for name, reason in refused.items())


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)
