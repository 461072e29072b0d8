"""Arguments of Unsloth, TRL, PEFT and transformers that have no counterpart here: each is warned about or refused by
name, unless its value asks for nothing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.config_checks import nearest
from jaxtune.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What to do with an argument that other libraries take.

    reason: what holds here instead, as the end of a sentence. harmless: values that ask for nothing. refused: an error
    instead of a warning, since results or files would not be what was asked for.
    """

    reason: str
    harmless: tuple[Any, ...] = (None,)
    refused: bool = False


def refused(reason: str, *harmless: Any) -> Foreign:
    """An argument whose value would change results: an error, unless the value is None or one of `harmless`."""
    return Foreign(reason, (None, *harmless), refused=True)


def ignored(reason: str, *harmless: Any) -> Foreign:
    """An argument without effect here: a warning, unless the value is None or one of `harmless`."""
    return Foreign(reason, (None, *harmless))


def settle(function: str, given: Mapping[str, Any], foreign: Mapping[str, Foreign], known: Iterable[str]) -> None:
    """Warn about or refuse every argument that `function` does not have.

    Args:
        function: its name, for messages. given: the arguments that are left. foreign: those of other libraries.
        known: those it has, to suggest one for a misspelt name.

    Raises:
        UserError: an argument that no library has, or one that would have to change results.
    """
    for name, value in given.items():
        rule = foreign.get(name)
        if rule is None:
            guess = nearest(name, known)
            hint = f"; did you mean {guess}?" if guess else f"; it takes {', '.join(known)}"
            raise UserError(f"{function}: unknown argument {name}={shown(value)}{hint}")
        if any(value is plain or (type(value) is type(plain) and value == plain) for plain in rule.harmless):
            continue
        if rule.refused:
            raise UserError(f"{function}: {name}={shown(value)} is not supported: {rule.reason}")
        warnings.warn(f"{function}: {name}={shown(value)} has no effect: {rule.reason}", UserWarning, stacklevel=3)
