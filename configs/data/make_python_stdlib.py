"""Make the bundled instruction set from the docstrings of Python's standard library; --check compares instead.

    python3.11 configs/data/make_python_stdlib.py [--check]

Sources are read and parsed, never imported, so the output depends on the Python release alone: the files beside this
script are Python 3.11.7's. A function serves one of two tasks: write the first paragraph of its docstring, given its
source; or write its `def` line, given its module and docstring. Eval records come from modules that train never sees.
Files with a copyright or licence notice of anyone but the Python Software Foundation are left out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import pathlib
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent
RELEASE = (3, 11, 7)
EVAL_MODULES = {
    "bisect", "calendar", "contextlib", "fractions", "heapq", "json", "json.decoder", "json.encoder", "mimetypes",
    "netrc", "random", "sched", "shlex", "shutil", "statistics", "tempfile", "urllib.parse",
}  # fmt: skip
# Tests, programs, and packages that began outside Python with a licence of their own: some files there carry no notice.
LEFT_OUT = (
    "asyncio.sslproto", "concurrent.futures", "ctypes", "distutils", "ensurepip", "http.cookiejar", "idlelib",
    "importlib.metadata", "importlib.resources", "lib2to3", "logging", "multiprocessing", "pydoc_data", "re",
    "site-packages", "sqlite3", "test", "this", "tkinter.tix", "tomllib", "turtledemo", "unittest", "venv",
    "wsgiref.validate", "xml.etree", "xmlrpc", "zoneinfo",
)  # fmt: skip
NOTICE = re.compile(r"copyright|licen[cs]e|permission to use|public domain|spdx", re.IGNORECASE)
PSF = "Python Software Foundation"
PER_MODULE = 15
MAX_SOURCE, MAX_LINES, MAX_DOCSTRING, MAX_SUMMARY = 700, 20, 500, 160

DOCUMENT = "Write the docstring of this Python function in one line."
DECLARE = "Write the def line of the Python function that has this docstring."


def module_name(path: pathlib.Path) -> str:
    """Dotted name of a source file given relative to the library's root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods of a module, in source order, with the dotted name of the module or class around each."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}.{node.name}")


def summary_of(docstring: str) -> str | None:
    """First paragraph as one line, where it is a plain sentence of moderate length."""
    text = " ".join(docstring.split("\n\n")[0].split())
    plain = re.fullmatch(r"[A-Z][a-z]+ .*\.", text) and text.isascii()
    return text if plain and 20 <= len(text) <= MAX_SUMMARY else None


def source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """The function's own lines, decorators included, docstring not; None where too little or too much is left."""
    docstring, *rest = node.body
    if all(isinstance(stmt, ast.Pass | ast.Raise) for stmt in rest):
        return None
    if docstring.lineno == node.lineno or rest[0].lineno == docstring.end_lineno:
        return None
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    head = lines[first - 1 : docstring.lineno - 1]
    body = "\n".join(lines[docstring.end_lineno : node.end_lineno]).strip("\n")
    text = textwrap.dedent("\n".join([*head, body]))
    return text if text.isascii() and len(text) <= MAX_SOURCE and text.count("\n") < MAX_LINES else None


def def_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The declaration alone, in one line."""
    bare = type(node)(node.name, node.args, [ast.Pass()], [], node.returns, None)
    return ast.unparse(ast.fix_missing_locations(bare)).splitlines()[0]


def records() -> Iterator[dict[str, str]]:
    """Every record, in the order of the sources."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        module = module_name(path.relative_to(root))
        if any(f".{module}.".startswith(f".{name}.") for name in LEFT_OUT) or ".test." in module or "-" in module:
            continue
        text = path.read_text(encoding="utf-8")
        if any(NOTICE.search(line) and PSF not in line for line in text.splitlines()):
            continue
        taken = 0
        for owner, node in functions(ast.parse(text).body, module):
            docstring = ast.get_docstring(node) or ""
            summary = summary_of(docstring)
            source = source_without_docstring(node, text.splitlines()) if summary else None
            if not summary or not source or seen & {summary, source} or taken == PER_MODULE:
                continue
            seen |= {summary, source}
            taken += 1
            declare = digest(f"{owner}.{node.name}") % 2 and len(docstring) <= MAX_DOCSTRING and docstring.isascii()
            yield {
                "instruction": DECLARE if declare else DOCUMENT,
                "input": f"{owner}:\n\n{docstring if declare else source}",
                "output": def_line(node) if declare else summary,
                "module": module,
            }


def digest(text: str) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def files() -> dict[str, bytes]:
    """Name and content of each file, records in an order that mixes modules."""
    split: dict[str, list[str]] = {"train": [], "eval": []}
    for record in records():
        split["eval" if record["module"] in EVAL_MODULES else "train"].append(json.dumps(record))
    return {
        f"python_stdlib.{name}.jsonl": "".join(line + "\n" for line in sorted(lines, key=digest)).encode()
        for name, lines in split.items()
    }


def main() -> None:
    """Write the files, or with --check fail where those here differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    check = parser.parse_args().check
    if sys.version_info[:3] != RELEASE:
        sys.exit(f"the files are those of Python {'.'.join(map(str, RELEASE))}; this is {sys.version.split()[0]}")
    for name, content in files().items():
        path = HERE / name
        if not check:
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            sys.exit(f"{path} differs from what this script makes; run it without --check")
        print(f"{name}: {len(content.splitlines())} records, {len(content)} bytes")


if __name__ == "__main__":
    main()
