"""`python -m jaxtune.data --config run.yaml`: a run's data as it will see them. No weight is read, no device used."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jaxtune.config import RunConfig
from jaxtune.config_io import check_files, load_config
from jaxtune.data.dataset import Dataset, build, eval_sets
from jaxtune.data.loader import Loader
from jaxtune.data.preview import Shown, show_row, to_html, visible
from jaxtune.data.report import describe_all
from jaxtune.errors import UserError
from jaxtune.loading import resolve_source, run_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.data",
        description="Show what a run will learn: statistics of its data and its first rows, learnt text marked.",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override: data.max_length=512")
    parser.add_argument("--n", type=int, default=3, help="rows to show (3)")
    parser.add_argument("--split", default="train", help="train, the default, or the name of an evaluation set")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the rows as a page")
    parser.add_argument("--overwrite", action="store_true", help="where there is such a page already")
    options = parser.parse_args(arguments)
    try:
        if options.html is not None and options.html.exists() and not options.overwrite:
            raise UserError(f"--html {options.html} exists; name another file, or add --overwrite")
        config = load_config(options.config, options.set)
        check_files(config)
        _preview(config, options.split, options.n, options.html)
    except (UserError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the system refuses: {error}; check the path, its permissions and the disk", file=sys.stderr)
        return 2
    return 0


def _preview(config: RunConfig, split: str, count: int, page: Path | None) -> None:
    if count < 0:
        raise UserError(f"--n is {count}; set it to 0 or more")
    tokenizer = run_tokenizer(config, resolve_source(config.model, weights=False))
    sets = {"train": build(config.data, tokenizer), **eval_sets(config.data, tokenizer)}
    if split not in sets:
        raise UserError(f"--split {split}: the run has {', '.join(sets)}; choose one of them")
    statistics = describe_all(sets)
    rows = [show_row(sets[split], row, tokenizer) for row in _first_rows(sets[split], split, config, count)]
    console = Console(highlight=False, soft_wrap=True)
    for text in statistics:
        console.print(Text(visible(text)))
    if rows:
        console.print(Text.assemble(f"\nThe first rows of {split}; ", *_parts(console, "this is learnt", 1.0)))
        for number, row in enumerate(rows, 1):
            _print_row(console, number, row)
    if page is not None:
        page.write_text(to_html(f"{split} of {config.output.dir}", statistics, rows), encoding="utf-8")
        console.print(f"\nwritten: {page}", markup=False)


def _first_rows(data: Dataset, split: str, config: RunConfig, count: int) -> list[list[int]]:
    """The rows that come first, in a run's own order."""
    if split != "train":
        plan = data.rows
        return [plan.row(row) for row in range(min(count, len(plan)))]
    settings = config.train
    loader = Loader(data, settings.batch_size, settings.gradient_accumulation_steps, settings.seed)
    epoch = itertools.takewhile(lambda item: item[1].epoch == 0, loader.rows())
    return [row for row, _ in itertools.islice(epoch, count)]


def _print_row(console: Console, number: int, row: Sequence[Shown]) -> None:
    documents = f"{len(row)} document{'s' if len(row) > 1 else ''}"
    console.print(Text(f"\n=== row {number}: {documents} ===", style="bold"))
    for shown in row:
        console.print(Text(f"\n--- {visible(shown.title)}", style="cyan"))
        console.print(Text.assemble(*(part for p in shown.pieces for part in _parts(console, p.text, p.weight))))


def _parts(console: Console, text: str, weight: float) -> list[tuple[str, str]]:
    """A piece of text in the style of its weight; where there are no colours, brackets say the same."""
    text = visible(text)
    if weight == 0:
        return [(text, "dim")]
    style = "bold green" if weight == 1 else "bold yellow"
    if console.color_system is None:
        return [(f"⟦{text}⟧" if weight == 1 else f"⟦{weight:g}: {text}⟧", style)]
    return [(text, style)]


if __name__ == "__main__":
    sys.exit(main())
