"""Check the implementations of an op against its definition, and time those that are right.

Values and gradients are compared with float32 truth on random data before anything is timed; what is off by more than
1.5 times the definition's own rounding gets no speed, and the exit status is 1. Without a GPU the check runs on reduced
shapes, kernels in Pallas' interpreter, and the real shapes are lowered to CUDA.

    python -m pallas_kernels.bench nf4_matmul --shapes llama3-8b
    python -m pallas_kernels.bench rms_norm --variant my_norm.py:my_rms_norm
    python -m pallas_kernels.bench --all --json kernels.json --plot kernels.png
    python -m pallas_kernels.bench --headline --json kernels.json
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from pallas_kernels.bench import products, report, rows, timing
from pallas_kernels.bench.case import BACKWARD, chosen
from pallas_kernels.bench.run import Row, rows_of

CASES = {
    "nf4": rows.nf4_cases,
    "nf4_matmul": products.nf4_matmul_cases,
    "fp8_matmul": products.fp8_matmul_cases,
    "lora_linear": products.lora_linear_cases,
    "norm_linear": products.norm_linear_cases,
    "glu_linear": products.glu_linear_cases,
    "rms_norm": rows.rms_norm_cases,
    "rope": rows.rope_cases,
    "glu": rows.glu_cases,
    "attention": products.attention_cases,
    "cross_entropy": products.cross_entropy_cases,
    "adam8bit": rows.adam8bit_cases,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"one or more of {', '.join(CASES)}")
    parser.add_argument("--all", action="store_true", help="all ops")
    parser.add_argument(
        "--headline",
        action="store_true",
        help="all ops, only what they choose by themselves, what goes through Triton, and the definition in XLA",
    )
    parser.add_argument("--shapes", nargs="+", default=[], help="cases by the beginning of their name, as llama3-8b")
    parser.add_argument("--variant", action="append", default=[], metavar="FILE.py:FUNCTION", help="of OP's signature")
    parser.add_argument("--sweep", action="store_true", help="try each combination of the variant file's TUNING")
    parser.add_argument("--forward", action="store_true", help="values only, for a variant without a gradient")
    parser.add_argument(
        "--small", action="store_true", help="check on reduced shapes only, also on a GPU: for compute-sanitizer"
    )
    parser.add_argument("--json", type=Path, help="write the rows; rows of other systems in the file are kept")
    parser.add_argument("--plot", type=Path, help="write a chart (needs matplotlib)")
    args = parser.parse_args(arguments)
    ops = args.ops or (list(CASES) if args.all or args.headline else [])
    if not ops or not {*ops} <= {*CASES}:
        parser.error(f"name an op, or --all; the ops are {', '.join(CASES)}")
    if args.variant and len(ops) != 1:
        parser.error("a variant has the signature of one op: name that op alone")
    if args.sweep and not args.variant:
        parser.error("--sweep tunes a variant: name one with --variant")
    try:
        variants = dict(named for text in args.variant for named in _variants(text, args.sweep))
    except ValueError as error:
        parser.error(str(error))
    on_gpu = jax.devices()[0].platform == "gpu"
    real = [case for op in ops for case in chosen(CASES[op](False), args.shapes)]
    if not real:
        names = sorted({case.name for op in ops for case in CASES[op](False)})
        parser.error(f"no case begins with {args.shapes}; there are {', '.join(names)}")
    timing_here = on_gpu and not args.small
    cases = real if timing_here else [case for op in ops for case in chosen(CASES[op](True), args.shapes)]
    if variants:
        # A backward pass alone is another function than the op.
        real, cases = ([case for case in some if BACKWARD not in case.timed] for some in (real, cases))
    ceilings = timing.ceilings() if timing_here else None
    if ceilings is not None:
        print(f"ceilings: {ceilings[0] / 1e12:.2f} TB/s, {ceilings[1] / 1e12:.0f} TFLOP/s in bfloat16", flush=True)
    print(report.title(), flush=True)
    begun = time.perf_counter()
    measured: list[Row] = []
    for row in rows_of(
        cases,
        variants,
        ceilings=ceilings,
        real_cases=real,
        with_gradient=not args.forward,
        headline=args.headline,
        progress=lambda text: print(f"{time.perf_counter() - begun:.0f} s: {text}", file=sys.stderr, flush=True),
    ):
        measured.append(row)
        print(report.line(row), flush=True)
        if args.json is not None:
            # After each row: a run that is ended early keeps what it has measured.
            report.write_json(args.json, measured, ceilings)
    if args.sweep and timing_here:
        _print_winners(measured, variants)
    if args.plot is not None:
        report.plot(args.plot, measured)
    if not on_gpu:
        print("This machine has no GPU: reduced shapes were checked, and nothing was timed.")
    return 1 if any(row.wrong for row in measured) else 0


def _variants(text: str, sweep: bool) -> list[tuple[str, Callable[..., Any]]]:
    """(name, function) of one --variant: one pair, or one for each point of the file's TUNING grid."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--variant {text}: write it as FILE.py:FUNCTION, with a file that exists")
    module = _loaded(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--variant {text}: {path} has no function {name}")
    if not sweep:
        return [(name, function)]
    grid = getattr(module, "TUNING", None)
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"--sweep: {path} must have TUNING, a dict of keyword argument -> values to try")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [(f"{name} {_point(point)}", functools.partial(function, **point)) for point in points]


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--variant: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _point(point: dict[str, Any]) -> str:
    return ",".join(f"{key}={value!r}" for key, value in point.items())


def _print_winners(measured: list[Row], variants: dict[str, Callable[..., Any]]) -> None:
    """The fastest right point for each case, as entries of a table that is reviewed and kept."""
    best: dict[tuple[str, int | None, str], tuple[float, Row]] = {}
    for row in measured:
        key = row.case, row.m, row.work
        if row.implementation in variants and row.us is not None and (key not in best or row.us < best[key][0]):
            best[key] = row.us, row
    print(f"# {jax.devices()[0].device_kind}: the fastest points")
    for (case, m, work), (us, row) in best.items():
        point = row.implementation.partition(" ")[2].replace(",", ", ")
        print(f"({case!r}, {m}, {work!r}): dict({point}),  # {us:.1f} us, {row.roofline_share:.0%} of the roofline")


if __name__ == "__main__":
    sys.exit(main())
