"""Help and public names come at once: nothing slow is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = {"jax", "numpy", "transformers", "datasets", "torch"}


def run(*arguments: str) -> tuple[str, float]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - started


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["-c", "import jaxtune; dir(jaxtune); jaxtune.__version__"], 0.5),
        (["-m", "jaxtune.train", "--help"], 2.5),
        (["-m", "jaxtune.sweep", "--help"], 2.5),
        (["-m", "jaxtune.generate", "--help"], 2.5),
        (["-m", "jaxtune.chat", "--help"], 2.5),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_comes_at_once(arguments: list[str], seconds: float) -> None:
    # The best of three: the machine may be busy.
    assert min(run(*arguments)[1] for _ in range(3)) < seconds


def test_imports_nothing_slow() -> None:
    modules, _ = run("-c", "import sys, jaxtune, jaxtune.command, jaxtune.config_io; print(*sys.modules)")
    assert not SLOW & set(modules.split())


def test_a_process_ends_at_once() -> None:
    """With its status, its output written, and what others registered for its end done; modules are not taken apart."""
    code = """
import atexit, sys
from jaxtune import command
class Left:
    def __del__(self): print("taken apart")
sys.left = Left()
def main():
    atexit.register(print, "registered")
    print("done", end=" ")
    return 3
command.main = main
sys.exit(command.process())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done registered\n", "")


def test_public_names() -> None:
    """Every public name is found on first use, and its own documentation says what it is."""
    run("-c", "import jaxtune\nfor name in jaxtune.__all__: assert getattr(jaxtune, name).__doc__, name")
    code = "import jaxtune\ntry: jaxtune.FastModel\nexcept AttributeError as error: print(error)"
    assert "has no attribute 'FastModel'; it has FastLanguageModel" in run("-c", code)[0]
