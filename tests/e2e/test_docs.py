"""The documentation: its commands run, its code runs, its messages and names are those of the program.

A block of commands below a comment such as `<!-- needs: a GPU -->` or `<!-- run by: tests/e2e/test_sweep.py -->` is not
run here; its modules and options are looked up. The script of from-unsloth.md is run by test_api.py.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from runs import COLOURS, Main, WriteRun, question, save_records

import jaxtune

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# In the order in which a reader comes to them: the first makes the run that the others speak of.
PAGES = ("first-fine-tune", "generation", "memory", "kernels")
WITH_CODE = ("generation", "kernels")
_BLOCK = re.compile(
    r"(?:<!-- (?P<needs>(?:needs|run by): .+?|test-command) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S
)


def blocks(page: Path, kind: str) -> Iterator[tuple[str, str | None]]:
    """Texts of the fenced blocks, and what each needs that a test has not."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] == kind:
            yield block["text"], block["needs"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.fixture(scope="module")
def place(write_run_in: WriteRun, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the pages speak of: run.yaml, my_records.jsonl, my-model, configs/."""
    directory = tmp_path_factory.mktemp("reader")
    (directory / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(base_model, directory / "my-model")
    save_records(directory / "my_records.jsonl", [question(thing) for thing in COLOURS] * 4)
    data, output = {"train": "my_records.jsonl"}, {"dir": "runs/mine"}
    write_run_in(directory, lora={"r": 8}, train={"max_steps": 2}, data=data, output=output)
    return directory


@pytest.fixture
def reader(place: Path, run_main: Main, monkeypatch: pytest.MonkeyPatch, shared: Path) -> Iterator[Path]:
    """In that directory, with the shared caches; the process is left as it was."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(shared))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = jax.config.values["jax_pjrt_client_create_options"]
    yield place
    jax.config.update("jax_pjrt_client_create_options", before)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command in this process: `python -m MODULE ...`, or `echo TEXT | python -m MODULE ...`."""
    if words[0] == "echo":
        monkeypatch.setattr("sys.stdin", io.StringIO(words[1] + "\n"))
        words = words[words.index("|") + 1 :]
    assert words[:2] == ["python", "-m"], f"{words} is no command of ours: mark what it needs"
    assert main_of(words[2])(words[3:]) in (0, None), words


def main_of(module: str):  # type: ignore[no-untyped-def]
    name = f"{module}.__main__" if hasattr(importlib.import_module(module), "__path__") else module
    return importlib.import_module(name).main


@pytest.mark.slow
def test_commands_and_code_run(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test for all pages, since workers share out tests and what follows speaks of the first page's run."""
    for page in PAGES:
        for text, needs in blocks(DOCS / f"{page}.md", "bash"):
            for words in commands(text) if needs is None else ():
                run(words, monkeypatch)
        for number, (text, needs) in enumerate(blocks(DOCS / f"{page}.md", "python")):
            if page in WITH_CODE:
                assert needs is None
                script = reader / f"{page}-{number}.py"
                script.write_text(text)
                runpy.run_path(str(script))


def test_options_of_all_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Also of those that are not run: they need what a test has not."""
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for text, _ in blocks(page, "bash"):
            for line in re.findall(r"python -m (jaxtune[\w.]*)([^\n|&]*)", text):
                module, arguments = line
                capsys.readouterr()
                with contextlib.suppress(SystemExit):
                    main_of(module)(["--help"])
                known = capsys.readouterr().out
                for option in re.findall(r"(?<=\s)--[a-z][\w-]*", arguments):
                    assert option in known, f"{page.name}: {module} has no {option}"


def test_imported_names_exist() -> None:
    names = {
        name.strip()
        for page in DOCS.glob("*.md")
        for names in re.findall(r"from jaxtune import ([\w, ]+)", page.read_text(encoding="utf-8"))
        for name in names.split(",")
    }
    assert "FastLanguageModel" in names
    assert names <= set(jaxtune.__all__)


def test_files_that_pages_link_to_exist() -> None:
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "code", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_messages_are_those_of_the_program() -> None:
    """Every heading of the page that quotes a message stands in the source, its parts in this order."""
    literals = [text for path in sources() for text in strings(path)]
    headings = re.findall(r"^### `(.*?)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(headings) > 12
    for heading in headings:
        parts = [re.escape(part) for part in heading.split("…")]
        pattern = re.compile(".*?".join(parts), re.S)
        assert any(pattern.search(text) for text in literals), heading


def sources() -> list[Path]:
    return [path for package in ("jaxtune", "convert") for path in (ROOT / package).rglob("*.py")]


def strings(path: Path) -> Iterator[str]:
    """The texts in a file's expressions, with … for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_implementations_in_the_table() -> None:
    table = (DOCS / "kernels.md").read_text(encoding="utf-8")
    for folder in (ROOT / "pallas_kernels").iterdir():
        if (folder / "api.py").is_file():
            (row,) = [line for line in table.splitlines() if f"pallas_kernels/{folder.name}/api.py" in line]
            for name in ("cudnn", "triton", "mosaic_gpu"):
                assert not (folder / f"{name}.py").is_file() or name.removesuffix("_gpu") in row, (folder.name, name)
