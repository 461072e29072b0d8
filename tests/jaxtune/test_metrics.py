"""metrics.jsonl and the progress display."""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxtune.errors import UserError
from jaxtune.metrics import (
    MetricsWriter,
    Progress,
    format_bytes,
    format_seconds,
    host_peak_rss,
    host_rss,
    read_metrics,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def strict_json(line: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_records_are_flushed_lines_of_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    loss = np.float32(1.2345678)
    with MetricsWriter(path) as writer:
        writer.write(0, phase="start", ok=True, nothing=None)
        writer.write(1, loss=loss, norm=jnp.bfloat16(0.5), tokens=jnp.int32(7))
        writer.write(2, loss=math.nan, norm=jnp.float32(jnp.inf), low=-math.inf)
        lines = path.read_text().splitlines()
        assert len(lines) == 3
    assert strict_json(lines[0]) == {"step": 0, "phase": "start", "ok": True, "nothing": None}
    assert strict_json(lines[1]) == {"step": 1, "loss": float(loss), "norm": 0.5, "tokens": 7}
    assert strict_json(lines[2]) == {"step": 2, "loss": "NaN", "norm": "Infinity", "low": "-Infinity"}
    records = read_metrics(path)
    assert np.float32(records[1]["loss"]) == loss
    assert math.isnan(records[2]["loss"])
    assert (records[2]["norm"], records[2]["low"]) == (math.inf, -math.inf)


def write_steps(writer: MetricsWriter, steps: range) -> None:
    for step in steps:
        writer.write(step, loss=1 / (step + 1))
        if step % 2 == 0:
            writer.write(step, eval_loss=float(step))


@pytest.mark.parametrize("resumed_step", [0, 4, 5, 9])
@pytest.mark.parametrize("cut", [b"", b'{"step": 10, "lo', b'{"step": 3}'])
def test_resumed_metrics_equal_the_uninterrupted_ones(tmp_path: Path, resumed_step: int, cut: bytes) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    with MetricsWriter(whole) as writer:
        write_steps(writer, range(15))
    with MetricsWriter(parts) as writer:
        write_steps(writer, range(10))
    with parts.open("ab") as file:
        file.write(cut)
    assert len(read_metrics(parts)) == 15
    with MetricsWriter(parts, resumed_step=resumed_step) as writer:
        write_steps(writer, range(resumed_step + 1, 15))
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.jsonl", "whole.jsonl"]


def test_metrics_errors(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path, resumed_step=3).close()
    with pytest.raises(
        UserError, match=r"metrics.jsonl has another run's metrics; resume that run, or change output.dir"
    ):
        MetricsWriter(path)
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is no record of metrics.*repair or remove it"):
        MetricsWriter(path, resumed_step=2)
    assert path.read_text() == '{"step": 1}\nrubbish\n{"step": 2}\n'


def test_plain_lines_where_there_is_no_terminal() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(log_every=5, console=Console(file=out, width=20), clock=clock) as progress:
        with progress.phase("compile [1/2]"):
            clock.now += 65
        progress.start(total_steps=12)
        for step in range(1, 13):
            clock.now += 2
            values: dict[str, float | None] = {
                "loss": 10 / step,
                "learning_rate": 1e-4,
                "grad_norm": 0.5,
                "tokens_per_second": 15903.4,
            }
            values |= {
                "mfu": 0.5312,
                "device_bytes": 9 * 2**30,
                "host_bytes": 2**30,
                "not_shown": 1,
                "eval_loss": 1.5 if step == 7 else None,
            }
            progress.update(step, values)
        progress.summary({"held-out loss": "2.0 -> 1.5"})
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["compile [1/2] ...", "compile [1/2]: 1:05"]
    assert [line.split("  ")[0] for line in lines[2:-2]] == ["step 5/12", "step 7/12", "step 10/12", "step 12/12"]
    assert lines[2].split("  ")[1:] == [
        "loss 2.0000",
        "lr 1.00e-04",
        "grad norm 0.500",
        "tokens/s 15,903",
        "MFU 53.1%",
        "device 9.00 GiB",
        "host 1.00 GiB",
        "ETA 14.0 s",
    ]
    assert ["eval loss 1.5000" in line for line in lines[2:-2]] == [False, True, False, False]
    assert lines[-2:] == ["summary:", "  held-out loss: 2.0 -> 1.5"]
    assert progress.phases == {"compile [1/2]": 65.0}


def test_failed_phase_says_so_and_raises() -> None:
    out = io.StringIO()
    with pytest.raises(KeyError), Progress(console=Console(file=out)) as progress, progress.phase("load"):
        raise KeyError("x")
    assert "load: failed after 0.0 s" in out.getvalue()
    assert progress.phases == {}


def test_terminal_block_keeps_the_last_values_and_counts_from_the_resumed_step() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=120, color_system=None, _environ={"TERM": "xterm"})
    with Progress(console=console, clock=clock) as progress:
        progress.start(total_steps=100, first_step=40)
        assert "step 40/100" in out.getvalue()
        progress.update(41, {"loss": 3.0, "eval_loss": 1.25})
        clock.now += 0.01
        progress.update(42, {"loss": 2.9})
        assert "step 42/100" not in out.getvalue(), "redrawn more often than the eye can follow"
        clock.now += 9.99
        out.truncate(0)
        progress.update(51, {"loss": 2.5})
        block = out.getvalue()
        progress.note("saved [checkpoint]")
    for part in ("step 51/100", "2.5000", "1.2500", "10.0 s, ETA 49.0 s", "loss █▇▁"):
        assert part in block
    assert "saved [checkpoint]" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_phase_turns_a_spinner_in_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None, _environ={"TERM": "xterm"})
    with Progress(console=console) as progress, progress.phase("compile [the step]"):
        time.sleep(0.3)
    assert out.getvalue().count("compile [the step]") > 2
    assert re.search(r"compile \[the step\]: 0\.[3-9] s\s*$", out.getvalue())


def test_terminal_is_left_in_order_after_an_error() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})

    def broken_run() -> None:
        with Progress(console=console) as progress:
            progress.start(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_run()
    assert out.getvalue().rstrip().endswith("\x1b[?25h")


def test_summary_panel() -> None:
    out = io.StringIO()
    Progress(console=Console(file=out, force_terminal=True, width=60, color_system=None)).summary({"a [b]": 1}, "done")
    assert "done" in out.getvalue()
    assert "a [b]  1" in out.getvalue()


def test_host_memory_sees_an_allocation() -> None:
    before, size = host_rss(), 96 * 2**20
    block = np.ones(size, np.uint8)
    assert 0.9 * size < host_rss() - before < 2 * size
    assert host_peak_rss() >= host_rss() > size
    del block
    assert host_peak_rss() > host_rss()


def test_formats() -> None:
    assert [format_bytes(x) for x in (0, 5 * 2**20, 1.5 * 2**30)] == ["0 MiB", "5 MiB", "1.50 GiB"]
    assert [format_seconds(x) for x in (0.04, 59.9, 65, 3599.6, 7207)] == [
        "0.0 s",
        "59.9 s",
        "1:05",
        "1:00:00",
        "2:00:07",
    ]
