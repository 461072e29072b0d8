"""Run a kept batch again, layer by layer: `python -m jaxtune.replay --run DIR [--step N]`.

A run keeps the batches of its last updates that were not finite (`train.on_nonfinite`) in `nonfinite/`, with the
adapter before the update. This reads one, and shows the largest magnitude after each layer and the rows as text.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune.base import find_base
from jaxtune.checkpoint import Checkpoints
from jaxtune.config_io import load_config
from jaxtune.device_memory import limit_memory
from jaxtune.errors import UserError
from jaxtune.nonfinite import Traced, replayable, trace
from jaxtune.start import start_from
from jaxtune.step import make_mesh
from jaxtune.structure import batch_structure, state_structure, step_settings

_TEXT = 300


def replay(run: Path, step: int | None = None) -> tuple[dict[str, Any], Traced, list[str]]:
    """A kept update's meta, its trace on one device, and the text of its rows.

    Raises:
        UserError: the run kept no such batch, or its files are damaged.
    """
    kept = Checkpoints(run / "nonfinite")
    if not kept.steps():
        raise UserError(f"{run} has kept no batch: none of its updates was other than finite; name another --run")
    config = load_config(run / "config.yaml")
    limit_memory(config.train.memory_limit)
    base, _ = start_from(config.lora, find_base(config.model))
    like = replayable(batch_structure(config), state_structure(config, base.decoder, base.dtype))
    arrays, meta = kept.restore(kept.steps()[-1] if step is None else step, like)
    state = state_structure(config, base.decoder, base.dtype)
    state = dataclasses.replace(state, step=arrays["step"], lora=arrays["lora"], rng=arrays["rng"])
    settings = step_settings(config, base.decoder, base.dtype, "full")
    batch = jax.device_get(arrays["batch"])
    traced = trace(batch, state, frozen=base.load(), config=settings, mesh=make_mesh(), place=jax.device_put)
    rows = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
    return meta, traced, [str(base.tokenizer.decode(row.tolist())) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.replay",
        description="Run a batch again whose loss or gradient was not finite, layer by layer.",
        epilog="exit status: 0 done, 2 something to correct, said in one message",
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's output.dir")
    parser.add_argument("--step", type=int, help="which of the kept ones; by default the last")
    options = parser.parse_args(arguments)
    # Read when the GPU client starts: memory is taken as it is needed instead of three quarters of the card at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        meta, traced, rows = replay(options.run.expanduser().absolute(), options.step)
    except (UserError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    happened = ", ".join(f"{name} {value}" for name, value in meta["values"].items())
    print(f"step {meta['step']}: {happened}, first {meta['where']}; now {traced.where}")
    for index, (loss, sizes) in enumerate(zip(traced.losses, traced.sizes)):
        print(f"micro-batch {index}: summed loss {loss:g}; largest magnitudes:")
        for number, size in enumerate(sizes):
            print(f"  {'embedded tokens' if number == 0 else f'layer {number - 1}':<16} {size:g}")
    for index, text in enumerate(rows):
        print(f"row {index}: {text[:_TEXT]!r}{' ...' if len(text) > _TEXT else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
