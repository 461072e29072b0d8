"""A long run that must not change as it goes on: nothing compiled, no memory grown, no step lost; and what follows.

    python benchmarks/reliability/soak.py --steps 5000
    python benchmarks/reliability/soak.py --shape llama3-8b --steps 300 --batch 2 --length 1024      # on a GPU

Random text is learnt from random weights, which are made on the device: the model's directory has their headers only,
in sparse files. After the run its checkpoints are verified, it is continued for ten steps more, and the adapter that it
wrote is read back and compared, bit by bit. Exit status 1 where something is not as it should be.

Of the device's memory the least that was in use counts, in the first and in the second half: what a step has used last
is given back in the runtime's own time.

The host's memory is judged in two ways, apart from each other: what the steps between two checkpoints add, summed up,
and what each checkpoint after the first leaves behind. The first one may keep as much as it has written: transfers from
a device go through buffers that its runtime keeps for the next time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from make_random_model import hf_config, write_documents, write_texts, write_tokenizer  # noqa: E402

from convert import families  # noqa: E402
from jaxtune.base import find_base  # noqa: E402
from jaxtune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig  # noqa: E402
from jaxtune.data.dataset import build, eval_sets  # noqa: E402
from jaxtune.device_memory import limit_memory  # noqa: E402
from jaxtune.export import load_peft_adapter  # noqa: E402
from jaxtune.health import random_arrays  # noqa: E402
from jaxtune.metrics import Progress, host_rss, read_metrics  # noqa: E402
from jaxtune.run_directory import RunDirectory  # noqa: E402
from jaxtune.structure import frozen_structure  # noqa: E402
from jaxtune.train import Outcome, fit  # noqa: E402

# Steps that may still compile and allocate; growth of the host's memory that is noise, over the rest of the run;
# checkpoints of a run.
WARM_UP, NOISE, SAVES = 20, 48 * 2**20, 6
CONTINUED = 10


@dataclasses.dataclass(frozen=True)
class Seen:
    """After a step: programs compiled so far, host memory, bytes in use on the device (None on a CPU), its loss."""

    step: int
    compiled: int
    host: int
    device: int | None
    loss: float


class Watch(Progress):
    """The display, which also keeps what it is told."""

    compiled = 0

    def __init__(self, log_every: int) -> None:
        super().__init__(log_every)
        self.seen: list[Seen] = []
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, name: str, *_: Any, **__: Any) -> None:
        self.compiled += name == "/jax/core/compile/backend_compile_duration"

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        stats = jax.local_devices()[0].memory_stats()
        in_use = stats["bytes_in_use"] if stats else None
        self.seen.append(Seen(step, self.compiled, host_rss(), in_use, values["loss"]))
        super().update(step, values)


def write_model(directory: Path, config: dict[str, object]) -> None:
    """Config, tokenizer, and a safetensors file whose data are a hole."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    header, end = {}, 0
    for slot in families.get("llama").slots(config):
        start, end = end, end + 2 * math.prod(slot.shape)
        header[slot.name] = {"dtype": "BF16", "shape": list(slot.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def make_config(
    directory: Path,
    shape: str,
    steps: int,
    batch: int,
    length: int,
    *,
    layers: int | None = None,
    packed: bool = False,
) -> RunConfig:
    """The run, at a constant rate so that it can be prolonged. layers: instead of the shape's own. packed: rows of
    several documents."""
    model = hf_config(shape)
    write_model(directory / "model", model if layers is None else model | {"num_hidden_layers": layers})
    if packed:
        write_documents(directory / "train.jsonl", 1)
    else:
        write_texts(directory / "train.jsonl", 1, count=256, length=length + 50)
    write_texts(directory / "eval.jsonl", 2, count=2 * batch, length=length + 50)
    data = {"train": str(directory / "train.jsonl"), "eval": str(directory / "eval.jsonl")}
    large, every = shape != "tiny", max(1, steps // SAVES)
    return RunConfig(
        ModelConfig(str(directory / "model"), dtype="bf16" if large else "fp32"),
        DataConfig(**data, form="text", train_on="all", max_length=length, packing=packed, overlong="truncate"),
        OutputConfig(str(directory / "run"), save_steps=every, compile_cache=str(directory / "compiled")),
        LoraConfig(r=64 if large else 8, lora_alpha=128 if large else 16),
        TrainConfig(
            batch_size=batch,
            max_steps=steps,
            learning_rate=2e-4 if large else 1e-3,
            lr_scheduler_type="constant",
            remat="full",
            logging_steps=max(1, steps // 10),
        ),
    )


def soak(config: RunConfig, watch: Watch, *, resume: bool) -> Outcome:
    """The run, with random weights that are the same each time."""
    with RunDirectory(config, resume) as directory:
        base = find_base(config.model)
        model = json.loads((Path(config.model.name_or_path) / "config.json").read_text())
        structure = frozen_structure(model, config.model, base.dtype)
        base = dataclasses.replace(base, load=lambda *_: random_arrays(structure, seed=1))
        sets = build(config.data, base.tokenizer), eval_sets(config.data, base.tokenizer)
        return fit(config, base, *sets, directory=directory, progress=watch)


def judge(seen: list[Seen], config: RunConfig, written: int) -> list[str]:
    """What is wrong with a run; prints its figures. written: bytes of a checkpoint."""
    steps, run = config.train.max_steps, Path(config.output.dir)
    assert steps is not None
    after = [row for row in seen if row.step > min(WARM_UP, steps // 2)]
    # The last step also measures the held-out loss.
    devices = [row.device or 0 for row in after[:-1]]
    halves = [min(part) for part in (devices[: len(devices) // 2], devices[len(devices) // 2 :])]
    compiled = after[-1].compiled - after[0].compiled
    losses = [row.loss for row in seen]
    tenth = max(1, steps // 10)
    first, last = (statistics.fmean(part) for part in (losses[:tenth], losses[-tenth:]))
    in_steps, by_save = host_growth(after, config.output.save_steps or steps)
    once, later = sum(by_save[:1]), sum(by_save[1:])
    records = read_metrics(run / "metrics.jsonl")
    held_out = [r["eval_loss"] for r in records if "eval_loss" in r]
    timed = [r for r in records if r.get("step", 0) > WARM_UP and "input_seconds" in r]
    seconds = [statistics.median(r[name] for r in timed) for name in ("step_seconds", "input_seconds")]
    print(f"steps {len(seen)}, compiled after step {after[0].step}: {compiled}")
    print(
        f"host memory {after[-1].host / 2**20:,.0f} MiB at the last step: steps added {in_steps / 2**20:.1f} MiB, the "
        f"first checkpoint of {written / 2**20:,.1f} MiB {once / 2**20:.1f} MiB, the {len(by_save[1:])} after it "
        f"{later / 2**20:.1f} MiB; at the end of the run {host_rss() / 2**20:,.0f} MiB"
    )
    counted = f"{halves[0]:,} bytes, then {halves[1]:,}; at most {max(devices):,}" if devices[0] else "not counted"
    print(f"device memory after step {after[0].step}: {counted}")
    print(f"a step of {1e3 * seconds[0]:.1f} ms, of which {1e6 * seconds[1]:.0f} us for the next batch (medians)")
    print(f"loss {first:.4f} -> {last:.4f}, held-out {held_out}")
    problems = [
        (compiled == 0, f"{compiled} programs were compiled in the loop"),
        (in_steps <= NOISE, f"host memory grew by {in_steps:,.0f} bytes in steps"),
        (later <= NOISE, f"host memory grew by {later:,.0f} bytes at checkpoints after the first"),
        (once <= NOISE + written, f"host memory grew by {once:,.0f} bytes at the first checkpoint"),
        (halves[0] == halves[1], f"device memory went from {halves[0]:,} bytes to {halves[1]:,}"),
        ([row.step for row in seen] == list(range(1, steps + 1)), "steps are missing"),
        (bool(np.isfinite(losses).all()) and last < first, f"the loss went from {first} to {last}"),
    ]
    return [text for ok, text in problems if not ok]


def host_growth(seen: list[Seen], save_steps: int) -> tuple[float, list[float]]:
    """Bytes that the host's memory grew by: in the steps between checkpoints, summed up, and at each checkpoint.

    Both from medians over the first and the last quarter of the steps between two checkpoints.
    """
    between = [list(rows) for _, rows in itertools.groupby(seen, lambda row: (row.step - 1) // save_steps)]
    edges = []
    for rows in between:
        quarter = -(-len(rows) // 4)
        edges.append([statistics.median(row.host for row in part) for part in (rows[:quarter], rows[-quarter:])])
    grown = [after[0] - before[1] for before, after in itertools.pairwise(edges)]
    return sum(end - start for start, end in edges), grown


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A long run, watched, and all that follows a run.")
    parser.add_argument("--shape", choices=("tiny", "llama3-8b"), default="tiny")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    limit_memory(None)
    with tempfile.TemporaryDirectory() as name:
        config = make_config(Path(name), options.shape, options.steps, options.batch, options.length)
        jax.config.update("jax_compilation_cache_dir", config.output.compile_cache)
        run, watch, started = Path(config.output.dir), Watch(config.train.logging_steps), time.perf_counter()
        soak(config, watch, resume=False)
        print(f"{options.steps} steps and all around them: {time.perf_counter() - started:.0f} s")
        checkpoint = run / "checkpoints" / str(options.steps)
        written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        problems = judge(watch.seen, config, written)

        # `fit` continues it, verifying the checkpoint as it reads it.
        longer = dataclasses.replace(
            config, train=dataclasses.replace(config.train, max_steps=options.steps + CONTINUED)
        )
        more = Watch(CONTINUED)
        outcome = soak(longer, more, resume=True)
        if [row.step for row in more.seen] != list(range(options.steps + 1, options.steps + CONTINUED + 1)):
            problems.append("the continued run has other steps")
        exported = jax.tree.map(jnp.asarray, load_peft_adapter(outcome.adapter)[0])
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), exported, outcome.lora)
        if not all(jax.tree.leaves(same)):
            problems.append("the exported adapter is not the trained one")
        bits = sum(leaf.nbytes for leaf in jax.tree.leaves(outcome.lora)) * 8
        print(f"continued to step {outcome.steps}; adapter for PEFT read back, {bits:,} bits compared")
    print("\n".join(problems) or "nothing is wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
