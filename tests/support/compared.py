"""What two runs are compared by, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from jaxtune.metrics import read_metrics

# What tells of time and machine, and not of what was computed; and what each start of the program writes of itself.
TIMINGS = (
    *("input_seconds", "step_seconds", "tokens_per_second", "mfu", "host_bytes"),
    *("device_bytes", "allocated_bytes", "reserved_bytes", "process_bytes"),
)
_OF_A_START = {"frozen_bytes", "versions", "compiled_bytes", "moment"}


def computed(output: Path) -> list[dict[str, Any]]:
    """The metrics without timings, and without the records that each start of the program makes of itself."""
    records = [record for record in read_metrics(output / "metrics.jsonl") if not record.keys() & _OF_A_START]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def saved_state(output: Path, step: int) -> dict[str, np.ndarray]:
    """Adapter, optimizer and the rest of a checkpoint's arrays, by name."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return flatten_dict(checkpointer.restore(output / "checkpoints" / str(step) / "state"), sep="/")
