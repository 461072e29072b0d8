"""What a value of a run's configuration may be, and the one sentence about a value that may not."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Any, Literal

from jaxtune.errors import UserError, shown

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (quote it where YAML reads it as something else)",
}


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def _typed(key: str, value: Any, expected: Any) -> Any:
    """`value` as the annotated type of `key`: whole numbers become floats and lists tuples where those are expected."""
    choices = typing.get_args(expected)
    if isinstance(expected, types.UnionType):
        if value is None and type(None) in choices:
            return None
        # What is given as a mapping or a list is meant as one, all else as the first member.
        kinds = {dict: dict, tuple: list | tuple}
        members = [choice for choice in choices if choice is not type(None)]
        fitting = [choice for choice in members if isinstance(value, kinds.get(typing.get_origin(choice), ()))]
        expected = (fitting or members)[0]
        choices = typing.get_args(expected)
    if expected is Any:
        return value
    if typing.get_origin(expected) is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{key} is {shown(value)}; it must be a mapping from names, such as {{name: value}}")
        return {name: _typed(f"{key}.{name}", item, choices[1]) for name, item in value.items()}
    if typing.get_origin(expected) is Literal:
        if value not in choices:
            guess = nearest(value, choices) if isinstance(value, str) else None
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(f"{key} is {shown(value)}; it must be one of {', '.join(choices)}{hint}")
        return value
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, list | tuple):
            kind = "whole numbers, such as [0, 1]" if choices[0] is int else "text, such as [first, second]"
            raise UserError(f"{key} is {shown(value)}; it must be a list of {kind}")
        return tuple(_typed(f"{key}[{i}]", item, choices[0]) for i, item in enumerate(value))
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as error:
            raise UserError(f"{key} is {shown(value)}; set it to a number below 1e308") from error
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{key} is {shown(value)}, of type {type(value).__name__}; it must be {_TYPE_NAMES[expected]}")
    if expected is int and abs(value) >= 2**32:
        raise UserError(f"{key} is {shown(value)}; set it to a number below 2**32")
    if expected is float and not math.isfinite(value):
        raise UserError(f"{key} is {value}; set it to a finite number")
    if expected is str and "\0" in value:
        raise UserError(f"{key} is {shown(value)}; a NUL character has no place in it")
    if expected is str and not value.strip():
        raise UserError(f"{key} is empty; write a value, or leave the key out for its default if it has one")
    return value


def parse_bytes(key: str, text: str) -> int:
    """The bytes that a text such as 12GiB, 12.5 GB or 900MiB means; `key` is what an error names."""
    units = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG]i?B)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"{key} is {shown(text)}; write a number and MiB, GiB, MB or GB, as in 12GiB")
    return int(float(match[1]) * units[match[2].upper()])


def check_types(section: str, config: Any) -> None:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _typed(f"{section}.{field.name}", getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)


def check_range(section: str, config: Any, names: str, test: typing.Callable[[Any], bool], rule: str) -> None:
    """Apply one rule to several fields, given as words; None, where the type admits it, is always in range."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not test(value):
            raise UserError(f"{section}.{name} is {shown(value)}; set it to {rule}")
