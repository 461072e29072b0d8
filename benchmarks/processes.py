"""Runs of a benchmark that are processes of their own, several of them at a time on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def row_of(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """The row that this script leaves when it is called once more, as `... --run ARGUMENTS FILE`: JSON in FILE.

    Where there is none: {"failed": its status, "log": the end of what it said}.
    """
    # As the train command has it; else the first process would take three quarters of the card.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as directory:
        row, log = Path(directory) / "row.json", Path(directory) / "log.txt"
        command = [sys.executable, *sys.argv, "--run", *arguments, str(row)]
        with log.open("w") as output:
            try:
                status: object = subprocess.run(
                    command, stdout=output, stderr=output, check=False, env=environment, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"longer than {seconds:.0f} s"
        if status != 0:
            return {"failed": status, "log": log.read_text(errors="replace")[-1500:]}
        found: dict[str, Any] = json.loads(row.read_text())
        return found
