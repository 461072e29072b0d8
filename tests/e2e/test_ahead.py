"""The step is traced from shapes while the weights are loaded, and it is the step that these weights need."""

from __future__ import annotations

import contextvars
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
from runs import Main, WriteRun

from jaxtune import finish, train
from jaxtune.ahead import Beside, Step
from jaxtune.compile_cache import mark_compiled, was_compiled
from jaxtune.metrics import read_metrics

VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE", default=0)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"load_in_4bit": True}},
        {"model": {"load_in_4bit": True, "double_quant": False}},
        {"model": {"dtype": "bf16", "embedding_on_host": True}, "train": {"optim": "paged_adamw_8bit"}},
    ],
    ids=["dense", "4 bits", "4 bits, one level", "embedding on host, paged"],
)
def test_is_traced_once(
    sections: dict[str, Any], write_run: WriteRun, run_main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And compiled once, before the weights are read, or beside where the cache has it."""
    cached: list[bool] = []

    class Seen(Step):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            cached.append(self.is_cached())

    monkeypatch.setattr(train, "Step", Seen)
    # JAX makes the first cache of a process only.
    (tmp_path / "cache").mkdir()
    cache = {"compile_cache": str(tmp_path / "cache")}
    for name in ("cold", "warm"):
        output = {"dir": str(tmp_path / name), **cache}
        status, stderr = run_main("--config", write_run(**sections, output=output), "--set", "train.max_steps=1")
        assert status == 0, stderr
    assert cached == [False, True]
    phases = {key for record in read_metrics(tmp_path / "warm" / "metrics.jsonl") for key in record}
    assert {"load_the_model_seconds", "trace_the_step_seconds", "compile_the_step_seconds"} <= phases


def test_a_step_of_other_weights_is_traced_anew(
    write_run: WriteRun, run_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the files hold something else than their config lets expect."""
    made: list[Step] = []
    monkeypatch.setattr(Step, "takes", lambda step, *arguments: made.append(step))
    status, stderr = run_main("--config", write_run(), "--set", "train.max_steps=1")
    assert (status, len(made)) == (0, 1), stderr


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(Path, "touch", refuse)
    mark_compiled("a program")
    assert not was_compiled("a program")
    monkeypatch.setattr(Path, "exists", refuse)
    assert not was_compiled("a program")


def test_the_last_checkpoint_does_not_wait_for_the_adapter(
    write_run: WriteRun, run_main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "save_peft_adapter", full)
    status, _ = run_main("--config", write_run(output={"save_steps": None}), "--set", "train.max_steps=2")
    assert status == 2
    assert (tmp_path / "out" / "checkpoints" / "2").is_dir()
    assert not (tmp_path / "out" / "adapter").exists()


def test_beside_gives_the_result_or_the_error() -> None:
    VARIABLE.set(3)
    with Beside(lambda check: (VARIABLE.get(), threading.current_thread())) as beside:
        value, thread = beside.result()
    assert value == 3
    assert thread is not threading.current_thread()

    def fail(check: Any) -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"), Beside(fail) as beside:
        beside.result()


def test_beside_ends_with_its_context() -> None:
    """At the next call of what the function is given."""
    started = threading.Event()

    def work(check: Any) -> None:
        while True:
            started.set()
            check()

    with Beside(work):
        assert started.wait(10)
    assert not any(thread.name == "jaxtune-beside" for thread in threading.enumerate())
