"""The bench refuses what is wrong, times what is right, and takes a variant from outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from pallas_kernels._device import compute_capability
from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import check, report, timing
from pallas_kernels.bench import run as run_of_cases
from pallas_kernels.bench.case import chosen
from pallas_kernels.bench.run import rows_of

VARIANTS = """
import jax
import jax.numpy as jnp

TUNING = {"shift": [0.0, 1.0]}


def norm(x, scale, *, eps, shift=0.0):
    f = x.astype(jnp.float32)
    y = f * jax.lax.rsqrt(jnp.mean(jnp.square(f), axis=-1, keepdims=True) + eps)
    return (y.astype(x.dtype) * scale + shift).astype(x.dtype)


def no_gradient(x, scale, *, eps):
    return jax.lax.stop_gradient(norm(x, scale, eps=eps))


def breaks(x, scale, *, eps):
    raise RuntimeError("no such kernel")
"""


@pytest.fixture
def compiled_quickly() -> Iterator[None]:
    """XLA leaves out what makes programs fast: what is run once, is mostly compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


needs_no_gpu = pytest.mark.skipif(compute_capability() is not None, reason="says what happens without a GPU")


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(VARIANTS)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = command.main([str(a) for a in arguments])
    return status, capsys.readouterr().out


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.usefixtures("compiled_quickly")
def test_every_op_is_right_and_lowers_on_its_first_case() -> None:
    for op, cases in command.CASES.items():
        small, real = (next(chosen(cases(reduced), [])) for reduced in (True, False))
        rows = list(rows_of([small], {}, ceilings=None, real_cases=[real]))
        assert {row.op for row in rows} == {op}
        for row in rows:
            refused = row.implementation in ("cudnn", "mosaic") and not row.wrong and "lowers" not in (row.note or "")
            assert refused or (not row.wrong and "lowers to CUDA" in (row.note or "")), report.line(row)
            assert row.us is None


@needs_no_gpu
def test_variants_are_checked_before_all_else(
    variants: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [f"--variant={variants}:{name}" for name in ("norm", "no_gradient", "breaks")]
    status, out = run(capsys, "rms_norm", "--shapes", "qwen3-0.6b/heads", "--json", tmp_path / "k.json", *names)
    lines = {line.split()[4]: line for line in out.splitlines() if " forward " in line}
    assert status == 1
    assert "timing needs a GPU" in lines["norm"]
    assert "WRONG: result 1 of 2" in lines["no_gradient"]
    assert "WRONG: RuntimeError: no such kernel" in lines["breaks"]
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert {row["implementation"] for row in rows} == {"triton", "xla", "norm", "no_gradient", "breaks"}
    assert all(row["us"] is None for row in rows)


@needs_no_gpu
def test_values_alone_and_a_grid(variants: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["rms_norm", "--shapes", "qwen3-0.6b/heads", "--forward"]
    status, out = run(capsys, *shapes, f"--variant={variants}:norm", "--sweep")
    assert status == 1
    assert any("norm shift=1.0" in line and "WRONG" in line for line in out.splitlines())
    assert any("norm shift=0.0" in line and "WRONG" not in line for line in out.splitlines())
    assert "WRONG: result 0 of 1" not in run(capsys, *shapes, f"--variant={variants}:no_gradient")[1]


@needs_no_gpu
@pytest.mark.parametrize("op", ["glu", "cross_entropy"])
def test_times_what_is_right(op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through XLA: calls behind each other, and calls that may write over their inputs."""
    monkeypatch.setattr(timing, "_MOST_CALLS", 3)
    cases = [case for case in chosen(command.CASES[op](True), ["llama3-8b"]) if case.m != 1][:2]
    told: list[str] = []
    timed = list(rows_of(cases, {}, ceilings=(1e12, 1e14), real_cases=cases, headline=True, progress=told.append))
    assert told[-1].startswith("compiled")
    # What goes through Triton has no GPU to be timed on; where the check is what is timed, that is the interpreter.
    assert op == "cross_entropy" or all(row.us is None for row in timed if row.implementation == "triton")
    timed = [row for row in timed if row.implementation != "triton"]
    assert timed
    for row in timed:
        # What a CPU chooses and the definition are one.
        assert (row.implementation, row.automatic, row.clock) == ("xla", True, "host")
        assert row.us is not None, report.line(row)
        assert row.us > 0
        assert row.temp_bytes is not None
        assert row.roofline_share is not None
        assert (row.gb_s is None) != (row.tflop_s is None)
        assert str(round(row.us, 1)) in report.line(row)
    report.write_json(tmp_path / "rows.json", timed, (1e12, 1e14))
    data = json.loads((tmp_path / "rows.json").read_text())
    data["rows"].append({"system": "peer"})
    (tmp_path / "rows.json").write_text(json.dumps(data))
    report.write_json(tmp_path / "rows.json", timed, (1e12, 1e14))
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][-1] == {"system": "peer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an op"),
        (["rms_norms"], "the ops are nf4"),
        (["nf4", "glu", "--variant", "x.py:f"], "name that op alone"),
        (["nf4", "--variant", "x.py:f"], "a file that exists"),
        (["nf4", "--sweep"], "name one with --variant"),
        (["nf4", "--shapes", "llama-9"], "no case begins with"),
    ],
)
def test_errors_say_what_to_write(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@needs_no_gpu
def test_a_case_without_truth_leaves_the_others_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    left = ["no room for the truth"]

    def bounds(own: list[float], results: list[jax.Array]) -> list[float]:
        if left:
            raise MemoryError(left.pop())
        return check.bounds(own, results)

    monkeypatch.setattr(run_of_cases, "bounds", bounds)
    cases = list(chosen(command.CASES["rms_norm"](True), ["qwen3-0.6b/heads"]))
    rows = list(rows_of(cases, {}, ceilings=None, real_cases=cases))
    assert [row.wrong for row in rows] == [True, False, False]
    assert rows[0].note == "nothing to compare with: MemoryError: no room for the truth"


def test_sets_exceed_the_cache_and_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_memory_bytes", lambda: 60e9)
    assert timing.plan(8.0, 31_000_000, in_place=False) == (60, 7)
    assert timing.plan(25_000.0, 10**9, in_place=False) == (9, 1)
    assert timing.plan(330.0, 705_000_000, in_place=True) == (12, 14)
    assert timing.plan(700.0, 10**11, in_place=True) == (3, 5)


def test_busy_time_leaves_out_gaps_and_counts_what_overlaps_once() -> None:
    calls = [(0, 1000), (500, 2000), (9000, 9500), (20000, 21000), (20500, 22000), (29000, 29700)]
    assert timing.busy_us(calls, 2) == [2.5, 2.7]
    assert timing.busy_us(calls[:-1], 2) == [2.25]
