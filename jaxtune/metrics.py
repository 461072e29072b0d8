"""What a run reports: metrics.jsonl for programs, a live view for people, and the host's memory for both."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress as Spinner
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxtune.errors import UserError
from jaxtune.trackers import Tracker

# How the values of a step are shown, name and text, in this order; what is not here goes to metrics.jsonl alone.
_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "loss": ("loss", lambda x: f"{x:.4f}"),
    "eval_loss": ("eval loss", lambda x: f"{x:.4f}"),
    "learning_rate": ("lr", lambda x: f"{x:.2e}"),
    "grad_norm": ("grad norm", lambda x: f"{x:.3f}"),
    "loss_scale": ("loss scale", lambda x: f"{x:g}"),
    "tokens_per_second": ("tokens/s", lambda x: f"{x:,.0f}"),
    "mfu": ("MFU", lambda x: f"{x:.1%}"),
    "device_bytes": ("device", lambda x: format_bytes(x)),
    "process_bytes": ("GPU process", lambda x: format_bytes(x)),
    "host_bytes": ("host", lambda x: format_bytes(x)),
}
_REFRESH_SECONDS = 0.1
_BARS = "▁▂▃▄▅▆▇█"
_BARS_WIDTH = 60


class MetricsWriter:
    """Appends records to a JSONL file: one object a line, flushed at once, so a killed run loses none.

    Each record has `step`, the number of updates done. JSON has no NaN or infinities: they are written as the strings
    "NaN", "Infinity" and "-Infinity", which Python's float() and JavaScript's Number() read back.

    path: the file; its directory is made; None for a process that leaves this to another. resumed_step: None for a new
    file. Otherwise lines of later steps, and a last line cut short, are removed, so that the file goes on as if the run
    had not been interrupted; for that a step's records must be written before its checkpoint. trackers: given every
    record's numbers as well, and closed with the file.
    """

    def __init__(
        self, path: str | Path | None, resumed_step: int | None = None, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path = Path(os.devnull if path is None else path)
        self._trackers = trackers
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if path is None:
            pass
        elif resumed_step is not None and self.path.exists():
            _truncate(self.path, resumed_step)
        elif self.path.exists():
            raise UserError(f"{self.path} has another run's metrics; resume that run, or change output.dir")
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Append one record of plain values or of scalars of NumPy or JAX."""
        values = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        record = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers if numbers else ():
            tracker.log(step, numbers)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, NaN and infinities as floats; without a last line cut short."""
    special = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return [
        {key: special.get(value, value) if isinstance(value, str) else value for key, value in record.items()}
        for record, _ in _records(Path(path))
    ]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number} is no record of metrics: {error}; repair or remove it") from error
        if line.endswith(b"\n"):
            yield record, line


def _truncate(path: Path, step: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(line for record, line in _records(path) if record["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Progress:
    """What a run shows of itself: in a terminal a view that is redrawn, elsewhere (a log, a notebook) plain lines.

    Use as a context manager, so that the terminal is left in order whatever happens. The view moves when it is told
    something; only while a phase lasts a thread turns its spinner.

    log_every: steps between plain lines. console: where to; the default is standard output. clock: seconds. quiet: show
    nothing.
    phases: after each `phase`, its duration in seconds by name.
    """

    def __init__(
        self,
        log_every: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        self.phases: dict[str, float] = {}
        self._console = console or Console(quiet=quiet)
        self._log_every = log_every
        self._clock = clock
        self._live: Live | None = None
        self._spinner: Spinner | None = None
        self._lock = threading.Lock()
        self._total = self._step = 0
        self._values: dict[str, Any] = {}
        self._losses: list[float] = []
        self._started = 0.0
        self._first: tuple[int, float] | None = None
        self._drawn = -math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def note(self, text: str) -> None:
        """One line of text, above the block if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that a part of the run (load, compile) begins, and at its end how long it took. Threads may have
        phases at the same time."""
        started = self._clock()
        try:
            with self._spinning(name) if self._is_live else contextlib.nullcontext():
                if not self._is_live:
                    self.note(f"{name} ...")
                yield
        except BaseException:
            self.note(f"{name}: failed after {format_seconds(self._clock() - started)}")
            raise
        self.phases[name] = self._clock() - started
        self.note(f"{name}: {format_seconds(self.phases[name])}")

    @contextlib.contextmanager
    def _spinning(self, name: str) -> Iterator[None]:
        """A line with a spinner; those of threads stand below each other."""
        with self._lock:
            if self._spinner is None:
                columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
                self._spinner = Spinner(*columns, console=self._console, transient=True)
                self._spinner.start()
            spinner, task = self._spinner, self._spinner.add_task(escape(name), total=None)
        try:
            yield
        finally:
            with self._lock:
                spinner.remove_task(task)
                if not spinner.task_ids:
                    spinner.stop()
                    self._spinner = None

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Begin to count. first_step: updates done before, by the run that is resumed."""
        self._total, self._step = total_steps, first_step
        self._started = self._clock()
        if self._is_live:
            self._live = Live(self._block(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show a step's loss, eval_loss, learning_rate, grad_norm, loss_scale, tokens_per_second, mfu, device_bytes,
        process_bytes and host_bytes.

        Other values and None are passed over, so the record of metrics.jsonl can be given as it is. A plain line is
        printed at every log_every-th step, at the last, and wherever there is an eval_loss.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        self._step = step
        shown = {name: value for name, value in values.items() if name in _SHOWN and value is not None}
        self._values.update(shown)
        if math.isfinite(values.get("loss", math.nan)):
            self._losses.append(values["loss"])
        last = step >= self._total
        if self._live is None:
            if last or step % self._log_every == 0 or "eval_loss" in shown:
                parts = [f"step {step}/{self._total}", *self._describe(shown), f"ETA {self._remaining()}"]
                self.note("  ".join(parts))
        elif last or now - self._drawn >= _REFRESH_SECONDS:
            self._live.update(self._block(), refresh=True)
            self._drawn = now

    def summary(self, rows: Mapping[str, object], title: str = "summary") -> None:
        """The end of the run: a panel of names and values."""
        self._stop()
        if not self._console.is_terminal:
            self.note("\n".join([f"{title}:", *(f"  {name}: {value}" for name, value in rows.items())]))
            return
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, style="bold"), Text(str(value)))
        self._console.print(Panel(table, title=Text(title), expand=False))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.update(self._block(), refresh=True)
            self._live.stop()
            self._live = None

    @property
    def _is_live(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _describe(self, values: Mapping[str, Any]) -> list[str]:
        return [f"{label} {show(values[name])}" for name, (label, show) in _SHOWN.items() if name in values]

    def _remaining(self) -> str:
        """Time left at the pace since the first update shown, which may itself have waited for a compilation."""
        if self._first is None or self._step <= self._first[0]:
            return "-"
        pace = (self._clock() - self._first[1]) / (self._step - self._first[0])
        return format_seconds(pace * (self._total - self._step))

    def _block(self) -> Panel:
        head = Table.grid(padding=(0, 2))
        elapsed = f"{format_seconds(self._clock() - self._started)}, ETA {self._remaining()}"
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=32)
        head.add_row(Text(f"step {self._step}/{self._total}"), bar, Text(elapsed))
        shown = [(label, show(self._values[name])) for name, (label, show) in _SHOWN.items() if name in self._values]
        values = Table.grid(padding=(0, 3))
        for start in range(0, len(shown), 5):
            values.add_row(*(Text(label, style="dim") for label, _ in shown[start : start + 5]))
            values.add_row(*(Text(text, style="bold") for _, text in shown[start : start + 5]))
        curve = Text.assemble(("loss ", "dim"), _bars(self._losses, _BARS_WIDTH)) if len(self._losses) > 1 else Text("")
        return Panel(Group(head, values, curve), expand=False)


def _bars(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` bars, each the mean of as many values."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / ((high - low) or 1.0) * (len(_BARS) - 1))] for mean in means)


def host_rss() -> int:
    """Memory of this process on the host now, in bytes; its peak where the system does not tell (no /proc)."""
    return _from_proc("VmRSS") or host_peak_rss()


def host_peak_rss() -> int:
    """The most memory this process has held on the host, in bytes."""
    # Linux's getrusage also counts what the parent held when it forked, hence /proc first. Its unit is 1024 bytes.
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _from_proc("VmHWM") or usage


def _from_proc(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def format_bytes(count: float) -> str:
    """Bytes as GiB, or as MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_change(before: float | None, after: float | None) -> str:
    """A held-out loss beside the one before; either may not have been measured."""
    if after is None:
        return "not measured"
    return f"{after:.4f}" if before is None else f"{before:.4f} -> {after:.4f} ({(after / before - 1):+.1%})"


def format_seconds(seconds: float) -> str:
    """A duration: 4.2 s, 1:05, 2:00:07."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
