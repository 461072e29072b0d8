"""Install the project at both ends of its dependencies' bounds, run a short part of the tests, and audit what is there.

    python benchmarks/reliability/check_dependencies.py --python 3.11 3.12 --resolution lowest-direct highest
    python benchmarks/reliability/check_dependencies.py --newest-oracles     # parity with today's transformers and PEFT

Needs `uv`. Each environment is a directory of its own below `--work`, made anew. Per environment it prints the versions
of the direct dependencies, the outcome of the tests, and pip-audit's findings with the number of packages that it could
audit: it exits with 0 too where it could audit none, which is a failure here. `--licences` prints a table of every
direct dependency's licence. Exit status 1 where tests or the audit fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Without PyTorch, which is no dependency.
TESTS = [
    "tests/jaxtune/test_config.py",
    "tests/jaxtune/test_checkpoint.py",
    "tests/jaxtune/test_mesh.py",
    "tests/data/test_loader.py",
    "tests/data/test_bad_input.py",
    "tests/e2e/test_errors.py",
    "tests/e2e/test_run.py",
    "tests/scale/test_mesh_program.py",
]
PARITY = [
    "tests/parity/test_llama_logits.py",
    "tests/parity/test_lora_gradients.py",
    "tests/parity/test_family_parity.py",
]
NEWEST = ("transformers", "peft", "torch", "accelerate")


def direct_dependencies() -> list[str]:
    """Names of the packages that pyproject.toml asks for, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]]


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command from the project's root, its output kept."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def check(python: str, resolution: str, work: Path, *, newest_oracles: bool) -> bool:
    """One environment; True where all is well."""
    name = "newest-oracles" if newest_oracles else resolution
    directory = work / f"{Path(python).name}-{name}"
    shutil.rmtree(directory, ignore_errors=True)
    interpreter = directory / "bin" / "python"
    what = [".", "pytest>=8", "pytest-timeout>=2.3", "rouge-score"]
    what += [package for package in NEWEST if newest_oracles]
    install: list[str | Path] = ["uv", "pip", "install", "--quiet", "--python", interpreter, "--resolution", resolution]
    for command in (["uv", "venv", "--quiet", "--python", python, directory], [*install, *what]):
        if (done := run(command)).returncode != 0:
            print(f"{python}, {name}: cannot be installed\n{done.stderr[-2000:]}")
            return False
    listed = json.loads(run(["uv", "pip", "list", "--python", interpreter, "--format", "json"]).stdout)
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}
    names = [package.lower().replace("_", "-") for package in [*direct_dependencies(), *NEWEST]]
    print(
        f"{python}, {name}: "
        + ", ".join(f"{package} {versions[package]}" for package in dict.fromkeys(names) if package in versions)
    )
    tests = PARITY if newest_oracles else TESTS
    # The tests import the checkout, which stands before what was installed.
    tested = run([interpreter, "-m", "pytest", "-q", "-m", "not gpu", *tests], JAX_PLATFORMS="cpu")
    print(f"  tests: {tested.stdout.strip().splitlines()[-1] if tested.stdout.strip() else tested.stderr[-500:]}")
    if tested.returncode != 0:
        print(tested.stdout[-3000:])
    audited = audit(interpreter)
    return tested.returncode == 0 and audited


def audit(interpreter: Path) -> bool:
    """pip-audit of an environment's packages; True where it could audit some and found nothing."""
    listed = run(["uv", "pip", "freeze", "--python", interpreter]).stdout
    pinned = interpreter.parent / "pinned.txt"
    pinned.write_text("\n".join(line for line in listed.splitlines() if "==" in line) + "\n")
    command: list[str | Path] = ["uv", "tool", "run", "pip-audit", "--format", "json", "--no-deps", "--disable-pip"]
    done = run([*command, "-r", pinned])
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"  pip-audit could not be run: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return False
    could = [package for package in packages if "vulns" in package]
    found = [(package["name"], package["version"], vuln["id"]) for package in could for vuln in package["vulns"]]
    print(f"  pip-audit: {len(could)} of {len(packages)} packages audited, {len(found)} vulnerabilities {found or ''}")
    if skipped := [package["skip_reason"] for package in packages if "vulns" not in package]:
        print(f"    of the others the first: {skipped[0]}")
    return bool(could) and not found


def licences() -> None:
    """A table of the direct dependencies' licences, as their installed metadata says."""
    print("| package | licence |\n|---|---|")
    for name in direct_dependencies():
        try:
            fields = metadata(name)
        except PackageNotFoundError:
            print(f"| {name} | not installed |")
            continue
        classifiers = [line.split(" :: ")[-1] for line in fields.get_all("Classifier") or () if "License" in line]
        text = (
            fields.get("License-Expression") or ", ".join(classifiers) or (fields.get("License") or "?").split("\n")[0]
        )
        print(f"| {name} | {text} |")


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Check the project at both ends of its dependencies' bounds.")
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12"], help="versions, or interpreters")
    parser.add_argument("--resolution", nargs="+", default=["lowest-direct", "highest"])
    parser.add_argument("--newest-oracles", action="store_true", help="the parity tests, newest transformers and PEFT")
    parser.add_argument("--licences", action="store_true", help="print the licences of this environment's packages")
    parser.add_argument("--work", type=Path, default=Path("environments"), help="where environments are made")
    options = parser.parse_args()
    if options.licences:
        licences()
        return 0
    resolutions = ["highest"] if options.newest_oracles else options.resolution
    outcomes = [
        check(python, resolution, options.work.absolute(), newest_oracles=options.newest_oracles)
        for python in options.python
        for resolution in resolutions
    ]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
