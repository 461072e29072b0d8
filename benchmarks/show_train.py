"""Write the README's table and chart of the train step from its rows.

    python benchmarks/show_train.py benchmarks/results/nvidia-h200/train_step.json

The tables go between the README's two `train_step` marks: steps, and seconds of first steps, loads and whole runs. The
chart stands beside the rows as `train_step.svg`: tokens per second over memory, to the upper left of which is better,
of steps of the 8B shape with 8,192 tokens or more.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- train_step: begin -->\n", "<!-- train_step: end -->\n"
COLOURS = {"jaxtune": "#0b7a75", "unsloth": "#c2410c", "hf": "#6b7280"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 340, 60, 44

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a row, those that failed left out, an asterisk at a step alone; and the seconds of rows that are
    of no step."""
    lines = ["| case | system | keeps | batch | tokens/s | ms a step | peak GiB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "peak_gib" in row:
            case = f"{row['case']} \\*" if row.get("alone") else row["case"]
            cells = case, row["system"], row["policy"], f"{row['batch']} x {row['seq']:,}"
            # A row whose GPU had other work has no speed.
            speed = [f"{row[name]:,}" if name in row else "-" for name in ("tokens_per_s", "ms_per_step")]
            figures = *speed, f"{row['peak_gib']:.2f}"
            lines.append(f"| {' | '.join(cells + figures)} |")
    others = [row for row in rows if "seconds" in row and "peak_gib" not in row]
    if others:
        lines += ["", "| | system | keeps | seconds |", "|---|---|---|---|"]
    for row in others:
        seconds = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row["seconds"].items())
        cells = f"{row['case']} {row.get('of', '')}".strip(), row["system"], row.get("policy", ""), seconds
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_chart(row: Row) -> bool:
    if row.get("peak_gib") is None or "tokens_per_s" not in row:
        return False
    return (
        row.get("model", "llama-3-8b") == "llama-3-8b"
        and row["batch"] * row["seq"] * row.get("accumulation", 1) >= 8192
    )


def chart(rows: Sequence[Row], title: str) -> str:
    """An SVG of one labelled dot a row."""
    rows = [row for row in rows if _in_chart(row)]
    right, top = 5 * (int(max(row["peak_gib"] for row in rows)) // 5 + 1), 1.08 * max(r["tokens_per_s"] for r in rows)
    low = 0.92 * min(row["tokens_per_s"] for row in rows)

    def at(gib: float, rate: float) -> tuple[float, float]:
        across = _LEFT + gib / right * (_WIDTH - _LEFT - 20)
        return round(across, 1), round(_HEIGHT - _BOTTOM - (rate - low) / (top - low) * (_HEIGHT - _BOTTOM - 30), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
        f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 8}" text-anchor="end">peak memory, GiB</text>',
        '<text x="8" y="34">tokens/s</text>',
    ]
    for gib in range(0, right + 1, 5):
        x, y = at(gib, low)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle" fill="#555">{gib}</text>')
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="40" stroke="#eee"/>')
    for rate in range(int(low) // 2000 * 2000 + 2000, int(top), 2000):
        x, y = at(0, rate)
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end" fill="#555">{rate:,}</text>')
        parts.append(f'<line x1="{x}" y1="{y}" x2="{_WIDTH - 20}" y2="{y}" stroke="#eee"/>')
    for row in rows:
        x, y = at(row["peak_gib"], row["tokens_per_s"])
        colour = COLOURS[row["system"]]
        label = html.escape(f"{row['system']}: {row['case']}")
        anchor, shift = ("end", -8) if x > 0.7 * _WIDTH else ("start", 8)
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + shift}" y="{y + 4}" text-anchor="{anchor}" fill="{colour}">{label}</text>')
    return "".join([*parts, "</svg>\n"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the README's table and chart of the train step.")
    parser.add_argument("rows", type=Path)
    options = parser.parse_args()
    result = json.loads(options.rows.read_text(encoding="utf-8"))
    title = f"QLoRA of Llama-3-8B, rank 64, one {result['device']}, {result['date']}"
    options.rows.with_suffix(".svg").write_text(chart(result["rows"], title), encoding="utf-8")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        parser.error(f"README.md lacks its marks {BEGIN.strip()} and {END.strip()}")
    readme.write_text(before + BEGIN + table(result["rows"]) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
