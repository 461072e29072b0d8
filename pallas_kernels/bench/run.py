"""From cases to rows: compile everything in parallel, check each implementation, then time those that are right."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.bench import timing
from pallas_kernels.bench.case import BOTH, FORWARD, Case, nbytes, with_gradients
from pallas_kernels.bench.check import bounds, relative_errors, verdict

SYSTEM = "pallas_kernels"
LOWERED = "right in the interpreter, lowers to CUDA"


@dataclasses.dataclass
class Row:
    """One line of the table. us, spread_us: median and distance between the quartiles, microseconds of one call.

    work: forward, forward+backward or backward. gb_s, tflop_s: which one bounds the call. roofline_share: least time
    over time. max_rel_err: the largest of values and gradients. note: why there is no speed.
    """

    op: str
    case: str
    m: int | None
    work: str
    implementation: str
    system: str = SYSTEM
    us: float | None = None
    spread_us: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline_share: float | None = None
    max_rel_err: float | None = None
    temp_bytes: int | None = None
    note: str | None = None
    wrong: bool = False


@dataclasses.dataclass
class _Prepared:
    """A case and its programs, compiled or being so. shapes, results, cotangent: of its inputs and results."""

    case: Case
    candidates: dict[str, Callable[..., Any]]
    shapes: tuple[Any, ...]
    results: Any
    cotangent: Any
    programs: dict[Any, Future]


def rows_of(
    cases: list[Case],
    extra: dict[str, Callable[..., Any]],
    *,
    ceilings: tuple[float, float] | None,
    real_cases: list[Case],
    with_gradient: bool = True,
) -> Iterator[Row]:
    """Rows in the order of the cases.

    Args:
        cases: what is checked, and on a GPU timed.
        extra: functions of the op's signature, beside the op's own implementations.
        ceilings: of the GPU at hand, as `timing.ceilings` gives them; with None kernels run in the interpreter and
            nothing is timed.
        real_cases: the cases in their real shapes, in the same order: without a GPU they are lowered for one.
        with_gradient: off for functions that have none.
    """
    if not with_gradient:
        cases, real_cases = ([_forward_only(case) for case in some] for some in (cases, real_cases))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        prepared = [_prepare(pool, case, case.candidates() | extra, ceilings) for case in cases]
        for one, real in zip(prepared, real_cases, strict=True):
            yield from _rows_of_case(one, ceilings, real)
            one.programs.clear()


def _forward_only(case: Case) -> Case:
    return dataclasses.replace(case, wrt=(), timed=tuple(w for w in case.timed if w != BOTH) or (FORWARD,))


def _prepare(
    pool: ThreadPoolExecutor,
    case: Case,
    candidates: dict[str, Callable[..., Any]],
    ceilings: tuple[float, float] | None,
) -> _Prepared:
    """Traces all programs of a case, and begins to compile them."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(case.make, key)
    results = jax.eval_shape(case.reference, *shapes)
    cotangent = jax.eval_shape(lambda key: _cotangent(key, results), key) if case.wrt else None
    own = with_gradients(case.reference, case.wrt)
    programs: dict[Any, Future] = {
        "make": _compiled(pool, case.make, key),
        "own": _compiled(pool, own, shapes, cotangent),
    }
    if case.wrt:
        programs["cotangent"] = _compiled(pool, lambda key: _cotangent(key, results), key)
    with jax.default_matmul_precision("highest"):
        programs["truth"] = _compiled(pool, case.exact, shapes, cotangent)
    checked = [jax.eval_shape(f, shapes, cotangent) for f in (own, case.exact)]
    programs["errors"] = _compiled(pool, relative_errors, *checked)
    prepared = _Prepared(case, candidates, shapes, results, cotangent, programs)
    for name, f in candidates.items():
        with interpreted() if ceilings is None else contextlib.nullcontext():
            called = _call(case, f)
            programs["check", name] = _compiled(pool, with_gradients(called, case.wrt), shapes, cotangent)
        if ceilings is None:
            continue
        for work in case.timed:
            inputs, floor, _ = _least(prepared, work, ceilings)
            calls, sets = _plan(prepared, inputs, work, floor)
            run = timing.program(_timed(case, f, work), calls, case.feed)
            programs[work, name] = _compiled(pool, run, [inputs] * sets, donate=() if case.feed is None else (0,))
    return prepared


def _rows_of_case(one: _Prepared, ceilings: tuple[float, float] | None, real: Case) -> Iterator[Row]:
    case, programs = one.case, one.programs
    keys = jax.random.split(jax.random.key(7), 2)
    make = programs["make"].result()
    inputs = make(keys[0])
    cotangent = programs["cotangent"].result()(keys[1]) if case.wrt else None
    truth, own = (programs[name].result()(inputs, cotangent) for name in ("truth", "own"))
    like = jax.tree.leaves(own)
    bound = bounds(programs["errors"].result()(own, truth).tolist(), like)
    for name, f in one.candidates.items():
        error, note, wrong = None, None, False
        try:
            results = programs["check", name].result()(inputs, cotangent)
            # Of the definition's dtypes, which the comparison is compiled for.
            leaves = [x.astype(y.dtype) for x, y in zip(jax.tree.leaves(results), like, strict=True)]
            errors = programs["errors"].result()(jax.tree.unflatten(jax.tree.structure(own), leaves), truth)
            error, note = float(jnp.max(errors)), verdict(errors.tolist(), bound)
            wrong = note is not None
            del results, leaves
        except NotImplementedError as refusal:
            note = str(refusal)
        except Exception as failure:  # noqa: BLE001 - a variant may raise anything, and one row says what
            note, wrong = _reason(failure), True
        lowered = _lowered(real, f) if ceilings is None and note is None else None
        for work in case.timed:
            row = Row(case.op, case.name, case.m, work, name, max_rel_err=error, note=note, wrong=wrong)
            if note is None and ceilings is not None:
                _time(row, one, name, work, ceilings, make)
            elif lowered is not None:
                row.note, row.wrong = lowered, not lowered.startswith(LOWERED)
            yield row


def _time(row: Row, one: _Prepared, name: str, work: str, ceilings: tuple[float, float], make: Any) -> None:
    """Fills in the row's measured fields, or why there are none."""
    shapes, floor, by_memory = _least(one, work, ceilings)
    calls, sets = _plan(one, shapes, work, floor)

    def make_sets() -> list[Any]:
        made = [make(key) for key in jax.random.split(jax.random.key(11), sets)]
        return (
            [(inputs, one.programs["cotangent"].result()(jax.random.key(13))) for inputs in made]
            if work == BOTH
            else made
        )

    try:
        run = one.programs[work, name].result()
        us, row.spread_us = timing.measure(run, make_sets, calls, floor, one.case.feed is not None)
        row.temp_bytes = run.memory_analysis().temp_size_in_bytes
    except Exception as failure:  # noqa: BLE001 - one row says what went wrong, the others are still measured
        row.note, row.wrong = _reason(failure), True
        return
    row.us, row.roofline_share = us, floor / us
    if by_memory:
        row.gb_s = floor * ceilings[0] / us / 1e9
    else:
        row.tflop_s = one.case.flops(work) / us / 1e6


def _least(one: _Prepared, work: str, ceilings: tuple[float, float]) -> tuple[Any, float, bool]:
    """Shapes of the inputs, microseconds that the call takes at least, and whether memory bounds it.

    Each array is moved once.
    """
    inputs: Any = (one.shapes, one.cotangent) if work == BOTH else one.shapes
    by_memory = (nbytes(inputs) + nbytes(one.results) + _gradient_bytes(one, work)) / ceilings[0] * 1e6
    by_products = one.case.flops(work) / ceilings[1] * 1e6
    return inputs, max(by_memory, by_products), by_memory >= by_products


def _plan(one: _Prepared, inputs: Any, work: str, floor: float) -> tuple[int, int]:
    results = nbytes(one.results) + _gradient_bytes(one, work)
    return timing.plan(floor, nbytes(inputs), results, one.case.feed is not None)


def _gradient_bytes(one: _Prepared, work: str) -> int:
    return sum(nbytes(one.shapes[i]) for i in one.case.wrt) if work == BOTH else 0


def _call(case: Case, f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: case.call(f, *inputs)


def _timed(case: Case, f: Callable[..., Any], work: str) -> Callable[..., Any]:
    return with_gradients(_call(case, f), case.wrt) if work == BOTH else _call(case, f)


def _lowered(real: Case, f: Callable[..., Any]) -> str:
    """What lowering the call and its gradients in their real shapes for a GPU says."""
    shapes = jax.eval_shape(real.make, jax.eval_shape(lambda: jax.random.key(0)))
    cotangent = jax.eval_shape(real.reference, *shapes)
    try:
        lower_for_cuda(with_gradients(_call(real, f), real.wrt), shapes, cotangent)
    except Exception as failure:  # noqa: BLE001 - what a lowering raises is not one class
        return f"does not lower to CUDA: {_reason(failure)}"
    return f"{LOWERED}; timing needs a GPU"


def _cotangent(key: Any, results: Any) -> Any:
    """Random, of the results' shapes: what gradients are checked with."""
    leaves, structure = jax.tree.flatten(results)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, x.shape).astype(x.dtype) if x.shape else jnp.ones((), x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def _compiled(pool: ThreadPoolExecutor, f: Callable[..., Any], *shapes: Any, donate: tuple[int, ...] = ()) -> Future:
    """f, traced at once and compiled in the background; what is wrong with it is raised by `result`."""
    try:
        return pool.submit(jax.jit(f, donate_argnums=donate).lower(*shapes).compile)
    except Exception as failure:  # noqa: BLE001 - a variant may raise anything, and one row says what
        failed: Future = Future()
        failed.set_exception(failure)
        return failed


def _reason(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
