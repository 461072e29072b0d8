"""The model families whose files can be read and written; a new one is a table beside these and a name here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from convert.families import gemma, llama, mistral, phi, qwen
from convert.families.table import Family

_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen.QWEN2,
        qwen.QWEN3,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        phi.PHI3,
    )
}
NAMES = tuple(_FAMILIES)


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


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """An HF config with its family's defaults where it lacks a key; raises as `get` does."""
    return {**get(config["model_type"]).defaults, **config}
