"""docs/configs.md is what the dataclasses say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_current() -> None:
    page = runpy.run_path(str(DOCS / "make_configs.py"))["page"]()
    assert (DOCS / "configs.md").read_text(encoding="utf-8") == page, "run python docs/make_configs.py"
    assert "| `r` | whole number | `16` | rank. |" in page
