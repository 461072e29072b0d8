"""Write the README's table and the chart of the kernels from their rows.

    python benchmarks/show_kernels.py benchmarks/results/nvidia-h200/kernels.json

The table goes between the README's two `kernels` marks: microseconds of the implementation that each op chooses by
itself, of the definition through XLA, and of the fastest function of each other system that is right. The chart, beside
the rows as `kernels.svg`, shows the same as a share of the least time that bytes and operations could take.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- kernels: begin -->\n", "<!-- kernels: end -->\n"
OURS, XLA = "pallas_kernels", "XLA"
SYSTEMS = {OURS: "#0b7a75", XLA: "#94a3b8", "unsloth": "#c2410c", "bitsandbytes": "#7c3aed", "torch": "#6b7280"}
# In the order in which one row of the table shows them.
WORKS = ("forward", "backward", "forward+backward")
# No result of bfloat16 products is off by this much; a row that is computes something else.
_WRONG = 0.02
_WIDTH, _LEFT, _BAR, _GAP = 800, 370, 9, 10

Row = Mapping[str, Any]


class Line(NamedTuple):
    """One case: work -> system -> its row."""

    op: str
    case: str
    m: int | None
    works: dict[str, dict[str, Row]]


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """The cases in the order of our rows, with the row that stands for each system."""
    lines: dict[tuple[str, str, int | None], Line] = {}
    for row in rows:
        if row["us"] is None:
            continue
        key = row["op"], row["case"], row["m"]
        if row["system"] == OURS:
            lines.setdefault(key, Line(*key, {}))
        elif key not in lines or (row["max_rel_err"] is not None and not row["max_rel_err"] < _WRONG):
            continue
        best = lines[key].works.setdefault(row["work"], {})
        for system in _systems(row):
            if system not in best or row["us"] < best[system]["us"]:
                best[system] = row
    return list(lines.values())


def _systems(row: Row) -> list[str]:
    """Under which headings a row stands: one of ours may be the op's own choice and the definition at once."""
    if row["system"] != OURS:
        return [row["system"]]
    return [name for name, stands in ((OURS, row["automatic"]), (XLA, row["implementation"] == "xla")) if stands]


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a case; several works of one case beside each other."""
    lines = lines_of(rows)
    shown = [system for system in SYSTEMS if any(system in best for line in lines for best in line.works.values())]
    head = ["kernel", "case", "rows", "", "runs through", *shown, "of the limit", "temporary MiB"]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for op, case, m, works in lines:
        done = [work for work in WORKS if work in works]
        own = [works[work].get(OURS) for work in done]
        cells = [op, case, "" if m is None else f"{m:,}", " / ".join(done)]
        cells.append(" / ".join(dict.fromkeys("" if row is None else row["implementation"] for row in own)))
        cells += [" / ".join(_us(works[work].get(system)) for work in done) for system in shown]
        cells.append(" / ".join("" if row is None else f"{row['roofline_share']:.0%}" for row in own))
        cells.append(" / ".join("" if row is None else f"{row['temp_bytes'] / 2**20:,.0f}" for row in own))
        text.append(f"| {' | '.join(_only(cell) for cell in cells)} |")
    return "\n".join(text) + "\n"


def _us(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['us']:.1f}" if row["us"] < 100 else f"{row['us']:,.0f}"


def _only(cell: str) -> str:
    """Nothing where all parts of a cell are empty."""
    return cell if cell.strip(" /-") else ""


def chart(rows: Sequence[Row], title: str) -> str:
    """An SVG: for each case and work a bar a system, as long as its share of the limit, with its microseconds."""
    groups = [(line, work, line.works[work]) for line in lines_of(rows) for work in WORKS if work in line.works]
    height = 60 + sum(len(best) * _BAR + _GAP for _, _, best in groups)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="10"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="16" font-size="13">{html.escape(title)}</text>',
    ]
    for i, (system, colour) in enumerate(SYSTEMS.items()):
        parts.append(f'<rect x="{8 + 110 * i}" y="26" width="9" height="9" fill="{colour}"/>')
        parts.append(f'<text x="{21 + 110 * i}" y="34">{system}</text>')
    full = _WIDTH - _LEFT - 60
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = _LEFT + share * full
        parts.append(f'<line x1="{x}" y1="52" x2="{x}" y2="{height}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{x}" y="49" text-anchor="middle" fill="#555">{share:.0%}</text>')
    y = 56.0
    for line, work, best in groups:
        rows_of_x = "" if line.m is None else f" {line.m:,}"
        label = html.escape(f"{line.op} {line.case.removeprefix('llama-3-8b').lstrip('/')}{rows_of_x} {work}")
        middle = y + len(best) * _BAR / 2 + 3
        parts.append(f'<text x="{_LEFT - 6}" y="{middle}" text-anchor="end">{label}</text>')
        for system, colour in SYSTEMS.items():
            if system in best:
                length = round(full * min(best[system]["roofline_share"] or 0.0, 1.0), 1)
                parts.append(f'<rect x="{_LEFT}" y="{y}" width="{length}" height="{_BAR - 1}" fill="{colour}"/>')
                parts.append(f'<text x="{_LEFT + length + 3}" y="{y + 8}" font-size="8">{_us(best[system])}</text>')
                y += _BAR
        y += _GAP
    return "".join([*parts, "</svg>\n"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the README's table and the chart of the kernels.")
    parser.add_argument("rows", type=Path)
    options = parser.parse_args()
    result = json.loads(options.rows.read_text(encoding="utf-8"))
    title = f"Share of the least time, and microseconds: Llama-3-8B, 8,192 tokens, {result['device']}, {result['date']}"
    options.rows.with_suffix(".svg").write_text(chart(result["rows"], title), encoding="utf-8")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        parser.error(f"README.md lacks its marks {BEGIN.strip()} and {END.strip()}")
    readme.write_text(before + BEGIN + table(result["rows"]) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
