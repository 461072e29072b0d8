"""The arrows between packages, read from the imports, and that importing does nothing else."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "convert", "jaxtune")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# What a module may import beside the standard library; the longest prefix of its name decides.
MAY_IMPORT = {
    "pallas_kernels": "pallas_kernels jax jaxlib numpy jaxtyping",
    "convert": "convert pallas_kernels.nf4 numpy ml_dtypes safetensors gguf tokenizers transformers jinja2 orbax"
    " jaxtyping libgguf",
    "jaxtune.config": "jaxtune.config_checks jaxtune.config_data jaxtune.errors",
    "jaxtune.config_checks": "jaxtune.errors",
    "jaxtune.config_data": "jaxtune.config_checks jaxtune.errors",
    "jaxtune.config_io": "jaxtune.config jaxtune.config_checks jaxtune.errors yaml",
    "jaxtune.command": "jaxtune.config_io jaxtune.errors jaxtune.launch",
    "jaxtune.data": "jaxtune.data jaxtune.config jaxtune.errors numpy jaxtyping datasets transformers jinja2 grain",
    "jaxtune.data.__main__": "jaxtune.data jaxtune.config jaxtune.config_io jaxtune.errors jaxtune.loading rich",
    "jaxtune.models": "jaxtune.models jaxtune.linear jaxtune.parts jaxtune.errors pallas_kernels jax numpy jaxtyping",
    "jaxtune": "jaxtune pallas_kernels jax numpy jaxtyping ml_dtypes flax optax orbax transformers jinja2 rich"
    " huggingface_hub",
    "jaxtune.api": "jaxtune jax numpy transformers datasets",
    "jaxtune.loading": "jaxtune convert pallas_kernels jax numpy flax transformers",
    "jaxtune.export": "jaxtune convert pallas_kernels jax numpy ml_dtypes transformers",
}
# One engine: nothing else stands on the main job.
ONLY_IMPORTED_BY = {"jaxtune.train": "jaxtune.api"}

IMPORT_IN_TURN = """
import importlib, os, sys
import jax._src.xla_bridge as xla_bridge
import jax.experimental.pallas.mosaic_gpu  # JAX itself points a variable to CUDA's tools here.
for name in sys.argv[1:]:
    before = dict(os.environ)
    importlib.import_module(name)
    assert dict(os.environ) == before, f"{name} changes the environment"
    assert not xla_bridge.backends_are_initialized(), f"{name} starts JAX's devices"
    assert "torch" not in sys.modules, f"{name} imports torch, which takes seconds"
"""


def imports(module: str) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it; of our own packages the module and not the name in it."""
    parts = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("module", FILES)
def test_imports_only_what_its_package_may(module: str) -> None:
    """torch, above all, is in no list: the tests alone have it, as an oracle."""
    rule = max((prefix for prefix in MAY_IMPORT if is_below(module, prefix)), key=len)
    allowed = [*MAY_IMPORT[rule].split(), *sys.stdlib_module_names]
    wrong = {name for name in imports(module) if not any(is_below(name, prefix) for prefix in allowed)}
    assert not wrong, f"{module} may import {MAY_IMPORT[rule]}"


def test_main_job_is_imported_by_its_doors_only() -> None:
    for target, door in ONLY_IMPORTED_BY.items():
        assert all(is_below(module, door) for module in FILES if target in imports(module)), target


@pytest.mark.parametrize("module", FILES)
def test_ops_are_used_by_their_public_names(module: str) -> None:
    """`pallas_kernels.<op>`, or its definition `pallas_kernels.<op>.reference`; implementations are the package's own,
    whose fused blocks are made of other ops' kernels."""
    if is_below(module, "pallas_kernels"):
        return
    for name in imports(module):
        package, _, rest = name.partition(".")
        _op, _, inner = rest.partition(".")
        if package == "pallas_kernels":
            assert inner in ("", "reference"), name


def test_no_cycles() -> None:
    """Imports inside of functions and for annotations only are counted too."""
    graph = {module: {name for name in imports(module) if name in FILES} - {module} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", FILES)
def test_plain_python(module: str) -> None:
    """No exec, eval, star import, bare except, global, or import inside of a function."""
    for node in ast.walk(TREES[module]):
        place = f"{module}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval", "compile", "__import__"), place
        elif isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), place
        elif isinstance(node, ast.ExceptHandler):
            assert node.type is not None, place
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            assert not any(isinstance(child, ast.Import | ast.ImportFrom) for child in ast.walk(node)), place
        assert not isinstance(node, ast.Global), place


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_starts_nothing(package: str) -> None:
    """Each module in turn: nothing is printed, no environment variable is set, no device is started, torch is not
    imported although it is installed here."""
    modules = [name for name in FILES if is_below(name, package) and not name.endswith("__main__")]
    command = [sys.executable, "-c", IMPORT_IN_TURN, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
