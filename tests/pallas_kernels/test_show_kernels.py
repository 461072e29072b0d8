"""The table and chart of the kernels say what the rows say, and the README's are those of the kept rows."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/kernels.json"))


@pytest.fixture(scope="module")
def show() -> Any:
    spec = importlib.util.spec_from_file_location("show_kernels", ROOT / "benchmarks" / "show_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(
    work: str, us: float | None, implementation: str, system: str = "pallas_kernels", **rest: Any
) -> dict[str, Any]:
    values = {"op": "glu", "case": "llama-3-8b/silu", "m": 8192, "work": work, "us": us, "system": system}
    values |= {"implementation": implementation, "automatic": False, "max_rel_err": 1e-3, "temp_bytes": 2**20}
    return values | {"roofline_share": None if us is None else 160 / us} | rest


def test_a_line_a_case_with_the_fastest_right_row_of_each_system(show: Any) -> None:
    rows = [
        row("forward", 161.0, "triton", automatic=True),
        row("forward", 168.0, "xla"),
        row("backward", 33.04, "triton", automatic=True),
        row("backward", None, "xla"),
        row("forward", 190.0, "slow", "unsloth"),
        row("forward", 166.4, "quick", "unsloth"),
        row("forward", 1.0, "wrong", "unsloth", max_rel_err=0.5),
        row("forward", 2.0, "nothing", "torch", max_rel_err=float("nan")),
        row("forward", 200.0, "of no case", "bitsandbytes", case="llama-3-8b/gelu"),
    ]
    head, _, line = show.table(rows).strip().splitlines()
    assert (
        head
        == "| kernel | case | rows |  | runs through | pallas_kernels | XLA | unsloth | of the limit | temporary MiB |"
    )
    cells = ["glu", "llama-3-8b/silu", "8,192", "forward / backward", "triton", "161 / 33.0", "168 / -", "166 / -"]
    assert line == f"| {' | '.join([*cells, '99% / 484%', '1 / 1'])} |"
    texts = [node.text for node in ElementTree.fromstring(show.chart(rows, "a < b")).iter() if node.text]
    assert "a < b" in texts
    assert {"161", "168", "166", "33.0"} <= set(texts)
    assert "1.0" not in texts


def test_what_the_op_chooses_may_be_the_definition(show: Any) -> None:
    line = show.table([row("forward", 25.0, "xla", automatic=True)]).splitlines()[2]
    assert "| xla | 25.0 | 25.0 |" in line


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_readme_shows_the_kept_rows(path: Path, show: Any) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert show.table(result["rows"]) in (ROOT / "README.md").read_text(encoding="utf-8")
    ElementTree.fromstring(path.with_suffix(".svg").read_text(encoding="utf-8"))
    for kept in result["rows"]:
        assert kept["us"] is None or kept["clock"] == "device"
