"""A run as one HTML file: curves, settings, versions, data and samples. `python -m jaxtune.report RUN` writes it again.

It is made of what the run left (config.yaml, metrics.jsonl) and needs no network, script or library to be read.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.charts import line_chart
from jaxtune.errors import UserError
from jaxtune.metrics import format_bytes, format_seconds, read_metrics

Records = Sequence[Mapping[str, Any]]

# Title, then by label the metrics that are drawn, and how a value is written.
_CHARTS: tuple[tuple[str, dict[str, str], Callable[[float], str]], ...] = (
    ("loss", {"training": "loss", "held out": "eval_loss"}, "{:.4g}".format),
    ("learning rate", {"learning rate": "learning_rate"}, "{:.3g}".format),
    ("gradient norm, before clipping", {"gradient norm": "grad_norm"}, "{:.4g}".format),
    ("tokens per second", {"tokens": "tokens_per_second"}, "{:,.0f}".format),
    ("share of the device's matrix rate (MFU)", {"MFU": "mfu"}, "{:.0%}".format),
    (
        "memory of the device",
        {"process": "process_bytes", "reserved": "reserved_bytes", "peak": "device_bytes", "now": "allocated_bytes"},
        format_bytes,
    ),
    ("memory of the host", {"host": "host_bytes"}, format_bytes),
)

# Parts of a step as XLA has planned them.
_COMPILED = {
    "step_argument_bytes": "compiled: weights, state and batch",
    "step_temporary_bytes": "compiled: all else of forward pass, backward pass and update",
    "step_host_bytes": "compiled: in host memory",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #68727f; --line: #d9dee4; --back: #fff; --panel: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #97a1ad; --line: #353c45; --back: #14171b;
  --panel: #1c2026 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.2rem 0 }
.facts div { background: var(--panel); border-radius: 8px; padding: .6rem .8rem }
.facts span { display: block; color: var(--soft); font-size: .8rem } .facts b { font-size: 1.1rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem }
svg { width: 100%; background: var(--panel); border-radius: 8px }
svg text { font-size: 11px; fill: var(--soft) } svg .title { font-size: 13px; fill: var(--ink); font-weight: 600 }
svg .y, svg .legend { text-anchor: end } svg .x { text-anchor: middle }
svg .grid { stroke: var(--line) } svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.a { stroke: #3b7dd8 } .b { stroke: #d9822b } .c { stroke: #4c9a52 } .d { stroke: #a35cc7 } .e { stroke: #c94c4c }
.f { stroke: #2a9d9d } circle.a { fill: #3b7dd8 } circle.b { fill: #d9822b }
svg .legend { stroke: none } svg .legend.a { fill: #3b7dd8 } svg .legend.b { fill: #d9822b }
svg .legend.c { fill: #4c9a52 } svg .legend.d { fill: #a35cc7 } svg .legend.e { fill: #c94c4c }
svg .legend.f { fill: #2a9d9d }
table { border-collapse: collapse; width: 100% } td, th { border-top: 1px solid var(--line); padding: .4rem .6rem;
  text-align: left; vertical-align: top } td { white-space: pre-wrap; overflow-wrap: anywhere } th { color: var(--soft);
  font-weight: 600; white-space: nowrap } pre { background: var(--panel); border-radius: 8px; padding: .8rem;
  overflow: auto; font-size: .85rem }
"""


def write_report(directory: str | Path) -> Path:
    """Write `report.html` into a run's directory, from its config.yaml and metrics.jsonl, and return its path.

    Raises:
        UserError: the directory holds no run.
    """
    directory = Path(directory)
    metrics, config = directory / "metrics.jsonl", directory / "config.yaml"
    for needed in (metrics, config):
        if not needed.is_file():
            raise UserError(f"{directory} holds no run: {needed.name} is not there; name a run's output.dir")
    page = make_report(directory.resolve().name, read_metrics(metrics), config.read_text(encoding="utf-8"))
    path = directory / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def make_report(name: str, records: Records, config: str) -> str:
    """The page. name: of the run. records: of its metrics. config: its YAML."""
    charts = [
        line_chart(title, {label: points for label, key in lines.items() if (points := _points(records, key))}, show)
        for title, lines, show in _CHARTS
        if any(_points(records, key) for key in lines.values())
    ]
    start: dict[str, Any] = {}
    for record in records:
        start |= {key: record[key] for key in ("data", "versions") if key in record}
    sections = [
        ("", f'<div class="charts">{"".join(charts)}</div>' if charts else "<p>No update was done.</p>"),
        ("Memory of the device", _memory(records)),
        ("Data", _pre("\n".join(start.get("data", [])))),
        ("Samples", _samples(records)),
        ("Machine and versions", html_table(list(start.get("versions", {}).items()))),
        ("Configuration", _pre(config)),
    ]
    facts = "".join(f"<div><span>{_text(label)}</span><b>{_text(value)}</b></div>" for label, value in _facts(records))
    body = "".join(f"<h2>{title}</h2>{content}" if title else content for title, content in sections if content)
    return html_page(name, f'<div class="facts">{facts}</div>{body}')


def html_page(title: str, body: str) -> str:
    """A whole page around HTML that is escaped already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>{body}</body></html>\n"
    )


def html_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table of texts, escaped; without a header the first cell of a row is its name."""
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in header)] if header else []
    for row in rows:
        first = "td" if header else "th"
        cells = [f"<{first}>{_text(row[0])}</{first}>", *(f"<td>{_text(cell)}</td>" for cell in row[1:])]
        lines.append("".join(cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if rows else ""


def _facts(records: Records) -> list[tuple[str, str]]:
    """The figures that a reader looks for first."""
    updates = [record for record in records if "loss" in record]
    held_out = [loss for _, loss in _points(records, "eval_loss")]
    facts = [("updates", f"{len(updates):,}")]
    if updates:
        facts.append(("training loss", f"{updates[0]['loss']:.4f} → {updates[-1]['loss']:.4f}"))
    if held_out:
        facts.append(("held-out loss", f"{held_out[0]:.4f} → {held_out[-1]:.4f}"))
    seconds = sum(seconds for _, seconds in _points(records, "step_seconds"))
    tokens = sum(r["tokens_per_second"] * r["step_seconds"] for r in updates if "step_seconds" in r)
    if seconds:
        facts += [("tokens per second", f"{tokens / seconds:,.0f}"), ("time in updates", format_seconds(seconds))]
    for label, key in (
        ("device memory, peak", "device_bytes"),
        ("GPU process, most seen", "process_bytes"),
        ("host memory, most seen", "host_bytes"),
    ):
        if points := _points(records, key):
            facts.append((label, format_bytes(max(value for _, value in points))))
    return facts


def _memory(records: Records) -> str:
    """What the device held, moment by moment; and the parts of a step, as planned, since none can be watched."""
    columns = {
        "allocated": "allocated_bytes",
        "most so far": "device_bytes",
        "reserved by the allocator": "reserved_bytes",
        "process, by the driver": "process_bytes",
    }
    updates = [record for record in records if "loss" in record]
    # Of a run that was continued, as its last start has them.
    moments = {record["moment"]: record for record in records if "moment" in record}
    moments |= {f"after update {record['step']}": record for record in updates[:1] + updates[-1:]}
    rows = [(name, *(_bytes(record.get(key)) for key in columns.values())) for name, record in moments.items()]
    parts: dict[str, Any] = {}
    for record in records:
        parts |= {key: record[key] for key in ("planned_parts", "planned_bytes", *_COMPILED) if key in record}
    planned = [(text, _bytes(parts[key])) for key, text in _COMPILED.items() if key in parts]
    planned += [(f"estimated: {name}", _bytes(size)) for name, size in parts.get("planned_parts", {}).items()]
    seen = any(set(row[1:]) != {"-"} for row in rows)
    return (html_table(rows, ("", *columns)) if seen else "") + (
        f"<h2>Parts of a step, as planned</h2>{html_table(planned)}" if planned else ""
    )


def _bytes(size: Any) -> str:
    return format_bytes(size) if isinstance(size, int | float) else "-"


def _points(records: Records, key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]


def _samples(records: Records) -> str:
    """Prompts with their answers before and after, side by side."""
    answers: dict[str, dict[str, str]] = {}
    for record in records:
        if "sample" in record:
            answers.setdefault(record["prompt"], {})[record["sample"]] = record["answer"]
    rows = [(prompt, by.get("before", ""), by.get("after", "")) for prompt, by in answers.items()]
    return html_table(rows, ("prompt", "before", "after"))


def _pre(text: str) -> str:
    return f"<pre>{_text(text)}</pre>" if text.strip() else ""


def _text(value: str) -> str:
    """Escaped, and without the control characters that HTML does not allow."""
    return html.escape("".join(c if c in "\n\t" or ord(c) >= 32 else "�" for c in value))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxtune.report", description="Write a run's report.html again.")
    parser.add_argument("directory", help="output.dir of the run")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.directory))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
