"""The exceptions that a user is meant to read."""

from __future__ import annotations

import reprlib
from typing import Any


class UserError(ValueError):
    """Something the user can fix: the text names file or key, rule and remedy. Shown without a traceback."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop by a signal, and has saved what it had; the text says how to continue."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class Abandoned(KeyboardInterrupt):
    """A run that was asked to stop twice, and has not waited for its step; what was saved before stays."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxtuple = 3, 12, 12, 12


def shown(value: Any) -> str:
    """`repr` for messages about values from files, of bounded length and time whatever the value."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits.
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
