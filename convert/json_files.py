"""JSON files from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# An index of a hundred thousand tensors has a tenth of it.
_MAX_BYTES = 100_000_000


def read_json(path: Path, problem: str, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        problem, remedy: the error's words for a file that is damaged or holds something else.

    Raises:
        ValueError: "PATH: PROBLEM (why); REMEDY".
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"{size} bytes are more than {_MAX_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {problem} ({error}); {remedy}") from error
    return content
