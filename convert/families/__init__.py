"""The model families whose files can be read and written; a new one is a table beside `llama` and a line here."""

from __future__ import annotations

import difflib

from convert.families import llama
from convert.families.table import Family

_FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY,)}


def get(model_type: str) -> Family:
    """The family that HF calls `model_type`.

    Raises:
        ValueError: not supported; the text names the nearest families that are.
    """
    if model_type not in _FAMILIES:
        nearest = difflib.get_close_matches(model_type, _FAMILIES, n=3, cutoff=0.0)
        raise ValueError(
            f"model_type {model_type!r} is not supported; the nearest families that are: {', '.join(nearest)}"
        )
    return _FAMILIES[model_type]
