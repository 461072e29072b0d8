"""Whole runs of the command on the tiny model of `runs`, in processes of their own or in this one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import jax
import pytest
import yaml
from runs import COLOURS, RUN, Command, Main, WriteRun, question, save_model, save_records

from jaxtune import base, compile_cache, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of what runs may share: compiled programs and the data library's cache."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def write_run_in(base_model: Path, shared: Path) -> WriteRun:
    """Write data and a configuration into a directory; sections given replace single keys of RUN."""

    def write(directory: Path, name: str = "run.yaml", **sections: Mapping[str, Any]) -> Path:
        things = list(COLOURS)
        train = save_records(directory / "train.jsonl", [question(thing) for thing in things] * 3)
        held_out = save_records(directory / "eval.jsonl", [question(thing) for thing in things[:3]])
        paths: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(base_model)},
            "data": {"train": str(train), "eval": str(held_out)},
            "output": {"dir": str(directory / "out"), "compile_cache": str(shared / "compiled")},
        }
        keys = [*RUN, *(set(sections) - set(RUN))]
        merged = {key: {**RUN.get(key, {}), **paths.get(key, {}), **sections.get(key, {})} for key in keys}
        path = directory / name
        path.write_text(yaml.safe_dump(merged))
        return path

    return write


@pytest.fixture
def write_run(tmp_path: Path, write_run_in: WriteRun) -> WriteRun:
    """`write_run_in` for the test's own directory."""
    return lambda name="run.yaml", **sections: write_run_in(tmp_path, name, **sections)


@pytest.fixture(scope="session")
def command(shared: Path) -> Command:
    """Run `python -m jaxtune.train`, or other code, in a process of its own."""

    def run(*arguments: str | Path, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XLA_", "JAX_"))}
        # A tiny program compiles faster than JAX thinks worth keeping.
        settings = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        # Those that this process computes with, so that both compute the same bits.
        settings["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
        settings["HF_HOME"] = str(shared / "hf")
        paths = [environment.pop("PYTHONPATH", None), str(ROOT), kept.get("PYTHONPATH")]
        settings["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return subprocess.run(
            [sys.executable, *(["-m", "jaxtune.train"] if code is None else ["-c", code]), *map(str, arguments)],
            env=kept | settings | environment,
            cwd=shared,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path) -> Iterator[Main]:
    """Call the command's `main` in this process: exit status, and what it wrote to stderr."""
    # What the command sets before JAX starts, and where it caches, is no matter of the tests that follow.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared / "datasets")
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {name: jax.config.values[name] for name in compile_cache.CONFIGURED}

    def run(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        status = train.main([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    yield run
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are loaded or a step is compiled: what is wrong must have shown before."""

    def refuse(name: str) -> Callable[..., None]:
        def called(*arguments: Any, **named: Any) -> None:
            raise AssertionError(f"{name} was called")

        return called

    for module, name in ((base, "load_model"), (train, "jit_train_step")):
        monkeypatch.setattr(module, name, refuse(name))
