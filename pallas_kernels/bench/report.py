"""Rows as a table, as JSON with what they were measured on, and as charts."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.run import Row


def line(row: Row) -> str:
    """One row of the table."""
    rows = "-" if row.m is None else str(row.m)
    error = "-" if row.max_rel_err is None else f"{row.max_rel_err:.1e}"
    name = row.implementation + ("*" if row.automatic else "")
    head = f"{row.op:<13} {row.case:<38} {rows:>9} {row.work:<16} {name:<12} {error:>8}"
    if row.us is None or row.spread_us is None or row.roofline_share is None or row.temp_bytes is None:
        return f"{head}  {'WRONG: ' if row.wrong else ''}{row.note}"
    rate = f"{row.gb_s:.0f} GB/s" if row.gb_s is not None else f"{row.tflop_s:.0f} TFLOP/s"
    timed = f"{row.us:>10.1f} ±{row.spread_us:<7.1f} {rate:>12} {row.roofline_share:>5.0%}"
    return f"{head} {timed} {row.temp_bytes / 2**20:>9.1f}"


def title() -> str:
    """The table's first line. ± is the distance between the quartiles, * marks what an op chooses by itself."""
    head = f"{'op':<13} {'case':<38} {'m':>9} {'work':<16} {'implement.':<12} {'max err':>8}"
    return f"{head} {'us':>10} {'':<8} {'rate':>12} {'roof':>5} {'temp MiB':>9}"


def write_json(path: Path, rows: list[Row], ceilings: tuple[float, float] | None) -> None:
    """Rows, device, ceilings, versions, date and commit. An existing file keeps what it says of other systems."""
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    others = [row for row in kept["rows"] if row["system"] != Row.system]
    reached = None if ceilings is None else {"bytes_per_s": ceilings[0], "bf16_flop_per_s": ceilings[1]}
    data = kept | _header() | {"ceilings": reached, "rows": [dataclasses.asdict(row) for row in rows] + others}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def _header() -> dict[str, Any]:
    versions = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "versions": versions,
    }


def _commit() -> str | None:
    """Of the checkout that this file is in, or None where it is in none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def plot(path: Path, rows: list[Row]) -> None:
    """A bar for each timed row with its share of the roofline, and time against m where an op was timed for several.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the text says how to get it.
    """
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'jaxtune[plot]'") from error
    timed = [row for row in rows if row.us is not None]
    sweeps: dict[tuple[str, ...], list[Row]] = {}
    for row in timed:
        sweeps.setdefault((row.op, row.case, row.work, row.implementation), []).append(row)
    sweeps = {key: points for key, points in sweeps.items() if len(points) > 2}
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(16, 2 + 0.25 * len(timed)), constrained_layout=True)
    labels = [f"{row.op} {row.case} {row.m or ''} {row.work} {row.implementation}" for row in timed]
    bars.barh(labels, [row.roofline_share for row in timed])
    bars.invert_yaxis()
    bars.set_xlabel("share of the roofline")
    bars.set_xlim(0, 1)
    for key, points in sweeps.items():
        lines.plot([row.m for row in points], [row.us for row in points], marker="o", label=" ".join(key))
    if sweeps:
        lines.set_xscale("log", base=2)
        lines.set_yscale("log")
        lines.legend()
    lines.set_xlabel("m")
    lines.set_ylabel("microseconds")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
