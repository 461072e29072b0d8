"""`python -m jaxtune.sweep`: a grid of settings, one run after another or side by side, with one table and one chart.

    python -m jaxtune.sweep --config run.yaml --out runs/ranks --grid lora.r=8,16 --grid train.learning_rate=1e-4,2e-4

Every run is a process of its own and leaves what `python -m jaxtune.train` leaves, in a directory below --out; the
sweep adds `sweep.json` and `sweep.html` there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxtune.charts import SERIES_CLASSES, line_chart
from jaxtune.config import RunConfig
from jaxtune.config_checks import parse_bytes
from jaxtune.config_io import check_files, fingerprint, list_values, load_config
from jaxtune.errors import UserError
from jaxtune.metrics import format_bytes, read_metrics
from jaxtune.report import html_page, html_table

_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the grid: its name, its settings by dotted key, its directory."""

    name: str
    settings: dict[str, Any]
    directory: Path

    @property
    def number(self) -> str:
        """What its name begins with, and what tables and charts call it."""
        return self.name.partition("_")[0]

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.directory.with_name(self.directory.name + ".log")

    def is_done(self, config: RunConfig) -> bool:
        """Whether the run has left its adapter, its last act; UserError where that was another configuration's."""
        if not (self.directory / "adapter" / "adapter_config.json").is_file():
            return False
        if fingerprint(load_config(self.directory / "config.yaml")) != fingerprint(config):
            raise UserError(f"{self.directory} holds a run of other settings; name another directory with --out")
        return True


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to; None where it got no such figure. status: its exit status, 0 for a complete run."""

    point: Point
    status: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    device_bytes: float | None


def grid(axes: Sequence[str], directory: Path) -> list[Point]:
    """Every combination of `section.key=value,value,...` axes, the last varying fastest.

    Raises:
        UserError: an axis that cannot be read or is given twice, or a value given twice.
    """
    values: dict[str, list[Any]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        key = key.strip()
        choices = list_values(text) if equals else []
        if not choices or "." not in key:
            raise UserError(f"cannot read --grid {axis!r}; write section.key=value,value, as in lora.r=8,16")
        if key in values or any(choices.count(choice) > 1 for choice in choices):
            raise UserError(f"--grid {axis!r}: {'the key' if key in values else 'a value'} is given twice; keep one")
        values[key] = choices
    points = []
    for number, combination in enumerate(itertools.product(*values.values()), 1):
        settings = dict(zip(values, combination))
        words = "_".join(f"{key.partition('.')[2]}-{value}" for key, value in settings.items())
        # A number, since two values may differ only in what a file name cannot hold.
        name = f"{number:02}_" + re.sub(r"[^A-Za-z0-9._-]+", "-", words)[:80]
        points.append(Point(name, settings, directory / name))
    return points


def overrides(point: Point, common: Sequence[str], limit: int | None) -> list[str]:
    """The `--set` values of a run: those of all runs, the point's own, its directory, and its share of the memory."""
    own = [f"{key}={json.dumps(value)}" for key, value in point.settings.items()]
    share = [] if limit is None else [f"train.memory_limit={limit // 2**20}MiB"]
    return [*common, *own, f"output.dir={json.dumps(str(point.directory))}", *share]


def run_points(
    points: Sequence[Point],
    config: str,
    common: Sequence[str],
    *,
    side_by_side: int,
    limit: int | None,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Run each point in a process of its own, at most `side_by_side` at a time; exit statuses by name.

    What a run prints goes to its log. Where this is interrupted, so are the runs, which then save.
    """
    waiting = list(points)
    running: dict[str, subprocess.Popen[bytes]] = {}
    statuses: dict[str, int] = {}

    def start(point: Point) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jaxtune.train", "--config", config, "--resume=auto"]
        command += [part for text in overrides(point, common, limit) for part in ("--set", text)]
        with point.log.open("a") as log:
            # In a session of its own: a terminal's Ctrl-C would reach it beside the signal from here, and a second
            # signal stops a run without saving.
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                point = waiting.pop(0)
                running[point.name] = start(point)
                say(f"{point.name} ...")
            time.sleep(_POLL_SECONDS)
            for name, process in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[name]
                    statuses[name] = status
                    say(f"{name}: {'done' if status == 0 else f'failed with exit status {status}, see {name}.log'}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return statuses


def collect(point: Point, status: int) -> Result:
    """A run's figures from its metrics."""
    path = point.directory / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []

    def last(key: str) -> float | None:
        return next((record[key] for record in reversed(records) if record.get(key) is not None), None)

    speeds = sorted(record["tokens_per_second"] for record in records if "tokens_per_second" in record)
    speed = speeds[len(speeds) // 2] if speeds else None
    return Result(point, status, last("loss"), last("eval_loss"), speed, last("device_bytes"))


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Best first: by held-out loss, else by the last training loss; failed runs last."""

    def rank(result: Result) -> tuple[bool, float]:
        loss = result.loss if result.eval_loss is None else result.eval_loss
        return result.status != 0, float("inf") if loss is None or loss != loss else loss

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    return [
        (
            result.point.number,
            *(str(value) for value in result.point.settings.values()),
            number(result.eval_loss, "{:.4f}"),
            number(result.loss, "{:.4f}"),
            number(result.tokens_per_second, "{:,.0f}"),
            "-" if result.device_bytes is None else format_bytes(result.device_bytes),
            "done" if result.status == 0 else f"failed ({result.status})",
        )
        for result in sorted(results, key=rank)
    ]


def write_summary(results: Sequence[Result], directory: Path, console: Console) -> None:
    """The table on the console; the same with the curves as sweep.html; the figures as sweep.json."""
    header = ("run", *results[0].point.settings, "held-out loss", "loss", "tokens/s", "device", "")
    rows = _rows(results)
    table = Table()
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    charts = []
    for title, key in (("held-out loss", "eval_loss"), ("training loss", "loss")):
        curves = {}
        for result in results:
            path = result.point.directory / "metrics.jsonl"
            records = read_metrics(path) if path.is_file() else []
            points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
            if points:
                curves[result.point.number] = points
        # More curves than colours would not be told apart.
        for start in range(0, len(curves), len(SERIES_CLASSES)):
            charts.append(line_chart(title, dict(list(curves.items())[start : start + len(SERIES_CLASSES)])))
    body = f'<div class="charts">{"".join(charts)}</div><h2>Runs</h2>{html_table(rows, header)}'
    (directory / "sweep.html").write_text(html_page(directory.name, body), encoding="utf-8")
    plain = [dataclasses.asdict(result) | {"point": result.point.name, **result.point.settings} for result in results]
    (directory / "sweep.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m jaxtune.sweep`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.sweep",
        description="Run a grid of settings, and compare them in one table and one chart.",
        epilog="Runs that are complete already are not run again; interrupted ones go on. Exit status: 0 all runs are "
        "complete, 1 some failed, 2 something to correct, said in one message",
    )
    parser.add_argument("--config", required=True, help="YAML file that the runs have in common")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for all runs")
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=V1,V2", help="an axis; may be repeated")
    parser.add_argument("--out", required=True, type=Path, help="directory of the sweep")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="runs at a time on the device")
    parser.add_argument("--memory-limit", metavar="SIZE", help="of all runs together, such as 24GiB; shared equally")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    console = Console()
    try:
        if options.side_by_side < 1:
            raise UserError(f"--side-by-side is {options.side_by_side}; set it to 1 or more")
        if options.side_by_side > 1 and options.memory_limit is None:
            raise UserError("--side-by-side needs --memory-limit, the memory that the runs share")
        limit = options.memory_limit and parse_bytes("--memory-limit", options.memory_limit) // options.side_by_side
        points = grid(options.grid, options.out.absolute())
        # A mistake in the last point shows before the first one runs.
        waiting = []
        for point in points:
            config = load_config(options.config, overrides(point, options.set, limit))
            check_files(config)
            if not point.is_done(config):
                waiting.append(point)
        options.out.mkdir(parents=True, exist_ok=True)
        # As Ctrl-C: a scheduler that ends the sweep ends its runs, and they save.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            statuses = run_points(
                waiting,
                options.config,
                options.set,
                side_by_side=options.side_by_side,
                limit=limit,
                say=partial(console.print, markup=False, highlight=False, soft_wrap=True),
            )
        finally:
            signal.signal(signal.SIGTERM, before)
        results = [collect(point, statuses.get(point.name, 0)) for point in points]
        write_summary(results, options.out, console)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if any(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
