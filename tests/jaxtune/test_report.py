"""The report: what it draws and writes from a run's files, escaped, and on its own."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jaxtune import report
from jaxtune.charts import line_chart
from jaxtune.errors import UserError

EVIL = '<script>alert("x")</script> & \x00'


class Page(html.parser.HTMLParser):
    """Tags that are opened and closed, and everything a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(directory: Path, records: list[dict]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(f"model:\n  name_or_path: '{EVIL[:-1]}'\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def update(step: int, **values: float | str) -> dict:
    return {"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "tokens_per_second": 10.0, "step_seconds": 2.0} | values


def test_page_of_a_run(tmp_path: Path) -> None:
    records = [
        {"step": 0, "load_the_model_seconds": 1.0, "frozen_bytes": 5},
        {"step": 0, "data": ["train: 18 documents", EVIL], "versions": {"device": "cpu", "jax": "0.0.1"}},
        {"step": 0, "sample": "before", "prompt": EVIL, "answer": "nothing"},
        {"step": 0, "eval_loss": 4.0},
        {"step": 0, "step_argument_bytes": 2**30, "planned_parts": {"frozen weights": 2**20}, "planned_bytes": 2**30},
        {"step": 0, "moment": "after loading", "device_bytes": 2**30, "allocated_bytes": 2**29},
        *(update(n, device_bytes=n * 2**30, process_bytes=n * 2**31, mfu=0.5) for n in range(1, 6)),
        update(6, loss="NaN", eval_loss=2.0),
        {"step": 6, "sample": "after", "prompt": EVIL, "answer": "It is <b>blue</b>."},
    ]
    path = report.write_report(write_run(tmp_path / "<run>", records))
    page = Page(path.read_text(encoding="utf-8"))
    assert path.name == "report.html"
    assert page.open == []
    assert page.fetched == []
    assert not {"script", "b>blue", "img", "iframe", "link"} & page.seen
    for part in (
        "<run>",
        '<script>alert("x")</script> & �',
        "It is <b>blue</b>.",
        "train: 18 documents",
        "0.0.1",
        "4.0000 → 2.0000",
        "5.00 GiB",
        "GPU process, most seen10.00 GiB",
        "after loading512 MiB1.00 GiB--",
        "after update 1-1.00 GiB-2.00 GiB",
        "compiled: weights, state and batch1.00 GiB",
        "estimated: frozen weights1 MiB",
        "name_or_path",
    ):
        assert part in page.text
    assert "learning rate" not in page.text, "no record has one"
    assert page.text.count("held out") == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]


def test_run_without_updates_has_a_page(tmp_path: Path) -> None:
    path = report.write_report(write_run(tmp_path / "run", [{"step": 0, "frozen_bytes": 5}]))
    assert "No update was done." in path.read_text()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [update(1)])
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert report.main([str(tmp_path)]) == 2
    assert "holds no run: metrics.jsonl is not there" in capsys.readouterr().err
    with pytest.raises(UserError):
        report.write_report(tmp_path / "none")


def places(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, place.split(","))) for place in line.split()] for line in lines]  # type: ignore[misc]


def test_chart_puts_points_where_they_belong() -> None:
    svg = line_chart("t", {"a": [(0, 0.0), (5, 5.0), (10, 10.0)]})
    ElementTree.fromstring(svg)
    ((first, middle, last),) = places(svg)
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.1)
    assert first[0] < last[0]
    assert first[1] > last[1], "larger values are higher"


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(3.0, math.nan)],
        [(1.0, 2.0)],
        [(1.0, 0.0), (2.0, 0.0)],
        [(1.0, 1e-30), (2.0, 1e30)],
        [(1.0, -math.inf), (2.0, 5.0)],
        [(0.0, 1e-4), (1e6, 1e-4)],
    ],
)
def test_chart_of_awkward_values_stays_inside(points: list[tuple[float, float]]) -> None:
    svg = line_chart("a <b>", {"x": points, 'y"': points})
    ElementTree.fromstring(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    for x, y in (place for line in places(svg) for place in line):
        assert 0 <= x <= 560
        assert 0 <= y <= 240


def test_chart_breaks_at_values_that_are_not_finite() -> None:
    values = [1.0, 2.0, math.nan, math.inf, 2.0, 3.0, math.nan]
    assert [len(line) for line in places(line_chart("t", {"a": list(enumerate(values))}))] == [2, 2]


def test_long_curves_are_thinned_without_losing_a_peak() -> None:
    points = [(step, 1.0 + (step == 54321)) for step in range(100_000)]
    (line,) = places(line_chart("t", {"a": points}))
    assert len(line) < 2000
    assert sum(y == min(y for _, y in line) for _, y in line) == 1
