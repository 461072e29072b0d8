"""`python -m jaxtune.plan --config run.yaml`: what a run would take, before more than the model's config is fetched.

On a GPU the step is compiled for it, from shapes alone, and XLA's figure decides; everything else is the estimate of
`jaxtune.estimate`. Other devices are judged from their data sheets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jaxtune.config import RunConfig
from jaxtune.config_io import check_files, load_config, local_path
from jaxtune.data.dataset import build
from jaxtune.devices import SHEETS, sheet, this_device
from jaxtune.errors import UserError
from jaxtune.loading import find_hf_config, resolve_source, run_tokenizer
from jaxtune.metrics import format_bytes, format_seconds
from jaxtune.planning import Plan, Reach, advice, make_plan, with_mesh
from jaxtune.preflight import check_compute
from jaxtune.traffic import scaling


def show_plan(plan: Plan, remedy: str | None, console: Console) -> None:
    """Print a plan. remedy: what to change where it does not fit."""
    config, model, memory, device = plan.config, plan.model, plan.memory, plan.device
    train, data = config.train, config.data

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(
        f"{config.model.name_or_path}: {model.decoder.model_type}, {model.decoder.num_layers} layers, "
        f"{_count(model.parameters)} parameters, {_count(model.trainable)} trained "
        f"({model.trainable / model.parameters:.1%}), computed in {plan.dtype}"
    )
    say(f"{device.kind}: {format_bytes(device.memory)}, of which a run may take {format_bytes(device.usable)}")
    if data.max_length > model.decoder.max_position:
        say(f"data.max_length {data.max_length} is beyond the model's {model.decoder.max_position} positions")

    table = _table(f"one step: remat {plan.policy}, {train.batch_size} x {data.max_length} tokens", "bytes")
    for text, size in memory.parts.items():
        table.add_row(text, format_bytes(size))
    table.add_section()
    table.add_row("peak, estimated", format_bytes(memory.estimate))
    if memory.compiled is not None:
        table.add_row("peak, as compiled for this device", format_bytes(memory.compiled))
    table.add_row("host", format_bytes(memory.host))
    console.print(table)

    if plan.sent:
        along = ", ".join(f"{format_bytes(int(size))} along {axes}" for axes, size in plan.sent.items() if size > 2**20)
        say(f"each of {config.mesh.devices} devices holds this, and sends {along} in a step (docs/scale.md)")
        shares = (f"{share:.0%} over {link}" for link, share in scaling(plan.sent, plan.seconds).items())
        say(f"of perfect scaling, estimated as if nothing overlapped: {', '.join(shares)}")
    seconds = f"{format_seconds(plan.seconds)} a step ({plan.tokens_per_step / plan.seconds:,.0f} tokens/s), estimated"
    if plan.steps is None:
        say(f"steps: not known, since the data were not read; {plan.tokens_per_step:,} tokens and {seconds}")
    else:
        say(
            f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens: {plan.steps * plan.tokens_per_step:,} tokens, "
            f"{seconds}, {format_seconds(plan.steps * plan.seconds)} in all"
        )

    table = _table(f"policies on {device.name}, estimated", "peak", "fits", "a step", "largest batch", "longest row")
    for reach in plan.reaches:
        verdict = "yes" if reach.fits else "no"
        cells = format_bytes(reach.memory.peak), verdict, format_seconds(reach.seconds), *_reach(reach)
        table.add_row(reach.policy, *cells)
    console.print(table)
    table = _table(
        f"common cards, estimated: largest batch at {data.max_length} tokens / longest row",
        "usable",
        *(reach.policy for reach in plan.reaches),
    )
    for name, reaches in plan.cards.items():
        table.add_row(name, format_bytes(SHEETS[name].usable), *(" / ".join(_reach(reach)) for reach in reaches))
    console.print(table)
    say("It fits." if remedy is None else f"It does not fit. {remedy}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _reach(reach: Reach) -> tuple[str, str]:
    return (f"{reach.largest_batch:,}" if reach.largest_batch else "-"), (
        f"{reach.longest_row:,}" if reach.longest_row else "-"
    )


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def count_rows(config: RunConfig) -> int | None:
    """Rows of the training data, where data and tokenizer are on this machine; None where counting would fetch them."""
    name, train = config.model.name_or_path, config.data.train
    here = name.startswith("package:") or Path(name).expanduser().exists()
    if not here or any(local_path(data) is None for data in ([train] if isinstance(train, str) else train)):
        return None
    source = resolve_source(config.model)
    if not source.is_gguf and not any(source.path.glob("tokenizer*")):
        return None
    return len(build(config.data, run_tokenizer(config, source)).rows)


def make_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m jaxtune.plan`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.plan",
        description="What a run would take of a device, before anything but the model's config is fetched.",
        epilog="exit status: 0 the run fits, 1 it does not, 2 something to correct, said in one message",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override: train.max_steps=5")
    parser.add_argument("--device", help=f"judge another device from its data sheet: {', '.join(SHEETS)}")
    parser.add_argument("--no-compile", action="store_true", help="estimate on a GPU, too, instead of compiling")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        check_files(config)
        hf_config = find_hf_config(config.model)
        device = this_device() if options.device is None else sheet(options.device)
        check_compute(config.train, device)
        config, reason = with_mesh(config, hf_config, device, jax.device_count())
        compile_here = options.device is None and not options.no_compile and jax.default_backend() == "gpu"
        compile_here = compile_here and config.mesh.devices <= len(jax.devices())
        plan = make_plan(config, hf_config, device, compile_here=compile_here, rows=count_rows(config))
        if options.json:
            print(json.dumps(plan.to_json()))
        else:
            if reason:
                print(reason)
            show_plan(plan, None if plan.fits else advice(config, hf_config, device), Console())
    except (UserError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
