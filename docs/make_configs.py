"""Write docs/configs.md from the dataclasses of jaxtune.config, the one place that describes the keys.

python docs/make_configs.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from jaxtune.config import RunConfig

PAGE = Path(__file__).with_name("configs.md")
_HEAD = """\
# The keys of a run

A run is a YAML file of the sections below; `--set section.key=value` replaces any of them from the command line. A key
that does not exist, a value of the wrong type and settings that contradict each other are errors before anything is
read. The run's full configuration, defaults included, is kept in its `config.yaml`.

This page is written by `python docs/make_configs.py` from [jaxtune/config.py](../jaxtune/config.py).
"""
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", types.NoneType: "null", Any: "any"}


def page() -> str:
    """The page's text."""
    sections = typing.get_type_hints(RunConfig)
    return "\n".join([_HEAD, *(_section(name, section) for name, section in sections.items())])


def _section(name: str, section: Any) -> str:
    summary, meanings = described(section)
    hints = typing.get_type_hints(section)
    lines = [f"## {name}", "", summary, "", "| key | values | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        cells = f"`{field.name}`", _type(hints[field.name]), _default(field), meanings[field.name]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def described(section: Any) -> tuple[str, dict[str, str]]:
    """A section's summary and, by field, what its docstring says; fields described together share the text.

    Raises:
        ValueError: a field that the docstring does not describe.
    """
    text = " ".join((inspect.getdoc(section) or "").split())
    fields = [field.name for field in dataclasses.fields(section)]
    names = "|".join(sorted(fields, key=len, reverse=True))
    parts = re.split(rf"(?<=[.] )((?:{names})(?:, (?:{names}))*): ", text)
    meanings: dict[str, str] = {}
    for group, meaning in zip(parts[1::2], parts[2::2]):
        meanings |= dict.fromkeys(group.split(", "), meaning.strip())
    missing = [field for field in fields if field not in meanings]
    if missing:
        raise ValueError(f"{section.__name__}'s docstring does not describe {', '.join(missing)}")
    return parts[0].strip(), meanings


def _type(hint: Any) -> str:
    choices = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(choice) for choice in choices)
    if origin is tuple:
        return f"list of {_type(choices[0])}"
    if origin is dict:
        return f"mapping from name to {_type(choices[1])}"
    return _NAMES[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"`{', '.join(map(str, value)) or '[]'}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
