"""From cases to rows: compile some dozens of programs in parallel, then, with nothing else on the device, check each
implementation and time those that are right."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._device import compute_capability, lower_for_cuda
from pallas_kernels._dispatch import record_choices
from pallas_kernels._triton import interpreted
from pallas_kernels.bench import timing
from pallas_kernels.bench.case import BOTH, FORWARD, Case, nbytes, with_gradients
from pallas_kernels.bench.check import bounds, relative_errors, verdict

SYSTEM = "pallas_kernels"
# What the headline shows beside an op's own choice: the definition, and what serves GPUs that Mosaic does not.
DEFINITION, WITHOUT_MOSAIC = "xla", "triton"
LOWERED = "right in the interpreter, lowers to CUDA"
RIGHT = "right on this GPU; not timed"
# Compiled together: compiling searches for the fastest products on the device, and must not run beside what is timed.
_WAVE_PROGRAMS = 120
# What only the check needs is not searched for at all.
_CHECK_OPTIONS = {"xla_gpu_autotune_level": 0} | timing.OPTIONS


@dataclasses.dataclass
class Row:
    """One line of the table. us, spread_us: median and distance between the quartiles, microseconds of one call.

    work: forward, forward+backward or backward. gb_s, tflop_s: which one bounds the call. roofline_share: least time
    over time. max_rel_err: the largest of values and gradients. temp_bytes: that XLA allocates beside inputs and
    results. automatic: whether it is what the op chooses here by itself, or all that the case has. clock:
    "device" or "host", see `timing`. note: why there is no speed.
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
    automatic: bool = False
    clock: str | None = None
    note: str | None = None
    wrong: bool = False


@dataclasses.dataclass
class _Prepared:
    """A case and its programs, compiled or being so. shapes, results, cotangent: of its inputs and results. automatic:
    the implementation that the op chooses by itself."""

    case: Case
    candidates: dict[str, Callable[..., Any]]
    shapes: tuple[Any, ...]
    results: Any
    cotangent: Any
    automatic: str | None
    programs: dict[Any, Future]


def rows_of(
    cases: list[Case],
    extra: dict[str, Callable[..., Any]],
    *,
    ceilings: tuple[float, float] | None,
    real_cases: list[Case],
    with_gradient: bool = True,
    headline: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Rows in the order of the cases.

    Args:
        cases: what is checked, and on a GPU timed.
        extra: functions of the op's signature, beside the op's own implementations.
        ceilings: of the GPU at hand, as `timing.ceilings` gives them; with None nothing is timed, and without a GPU
            kernels run in the interpreter.
        real_cases: the cases in their real shapes, in the same order: without a GPU they are lowered for one.
        with_gradient: off for functions that have none.
        headline: time the implementation that the op chooses, Triton's, and the definition through XLA, alone.
        progress: told what is being waited for.
    """
    if not with_gradient:
        cases, real_cases = ([_forward_only(case) for case in some] for some in (cases, real_cases))
    waiting = list(zip(cases, real_cases, strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while waiting:
            wave: list[tuple[_Prepared, Case]] = []
            while waiting and sum(len(one.programs) for one, _ in wave) < _WAVE_PROGRAMS:
                case, real = waiting.pop(0)
                wave.append((_prepare(pool, case, extra, ceilings, headline), real))
            if ceilings is not None:
                _wait({program for one, _ in wave for program in one.programs.values()}, progress)
            for one, real in wave:
                yield from _rows_of_case(one, ceilings, real)
                one.programs.clear()


def _wait(programs: set[Future], progress: Callable[[str], None]) -> None:
    for done, _ in enumerate(as_completed(programs), start=1):
        if done % 20 == 0 or done == len(programs):
            progress(f"compiled {done} of {len(programs)} programs")


def _forward_only(case: Case) -> Case:
    return dataclasses.replace(case, wrt=(), timed=tuple(w for w in case.timed if w != BOTH) or (FORWARD,))


def _prepare(
    pool: ThreadPoolExecutor,
    case: Case,
    extra: dict[str, Callable[..., Any]],
    ceilings: tuple[float, float] | None,
    headline: bool,
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
    automatic = None if ceilings is None else _automatic(case, shapes)
    candidates = case.candidates()
    if headline and automatic is not None:
        candidates = {name: f for name, f in candidates.items() if name in (automatic, WITHOUT_MOSAIC, DEFINITION)}
    candidates |= extra
    for name, f in candidates.items():
        with interpreted() if compute_capability() is None else contextlib.nullcontext():
            called = _call(case, f)
            checking = with_gradients(called, case.wrt)
            checked_as_timed = _work_of_check(case) in case.timed
            options = timing.OPTIONS if checked_as_timed else _CHECK_OPTIONS
            programs["check", name] = _compiled(pool, checking, shapes, cotangent, options=options)
        if ceilings is None:
            continue
        for work in case.timed:
            if work == _work_of_check(case):
                programs[work, name] = programs["check", name]
                continue
            timed = with_gradients(called, case.wrt if work == BOTH else ())
            donate = (0,) if case.in_place else ()
            programs[work, name] = _compiled(
                pool, timed, shapes, cotangent if work == BOTH else None, donate=donate, options=timing.OPTIONS
            )
    return _Prepared(case, candidates, shapes, results, cotangent, automatic, programs)


def _work_of_check(case: Case) -> str | None:
    """What the program that is checked can be timed as: with gradients it is both ways."""
    if case.in_place:
        return None
    return BOTH if case.wrt else case.timed[0]


def _automatic(case: Case, shapes: tuple[Any, ...]) -> str | None:
    """What the op chooses by itself: of the choices of a call the outermost comes first. None where nothing serves."""
    with record_choices() as choices, contextlib.suppress(NotImplementedError):
        jax.eval_shape(_call(case, case.function), *shapes)
    return choices[0].implementation if choices else None


def _rows_of_case(one: _Prepared, ceilings: tuple[float, float] | None, real: Case) -> Iterator[Row]:
    case, programs = one.case, one.programs
    keys = jax.random.split(jax.random.key(7), 2)
    try:
        inputs = programs["make"].result()(keys[0])
        cotangent = programs["cotangent"].result()(keys[1]) if case.wrt else None
        truth, own = (programs[name].result()(inputs, cotangent) for name in ("truth", "own"))
        bound = bounds(programs["errors"].result()(own, truth).tolist(), jax.tree.leaves(own))
    except Exception as failure:  # noqa: BLE001 - as for want of memory: the cases after this one are still measured
        reason = f"nothing to compare with: {_reason(failure)}"
        yield Row(case.op, case.name, case.m, case.timed[0], "definition", note=reason, wrong=True)
        return
    like = jax.tree.leaves(own)
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
        lowered = None
        if ceilings is None and note is None:
            lowered = _lowered(real, f) if compute_capability() is None else RIGHT
        for work in case.timed:
            row = Row(case.op, case.name, case.m, work, name, max_rel_err=error, note=note, wrong=wrong)
            row.automatic = name == one.automatic or case.implementations == (name,)
            if note is None and ceilings is not None:
                _time(row, one, name, work, ceilings)
            elif lowered is not None:
                row.note, row.wrong = lowered, not lowered.startswith((LOWERED, RIGHT))
            yield row


def _time(row: Row, one: _Prepared, name: str, work: str, ceilings: tuple[float, float]) -> None:
    """Fills in the row's measured fields, or why there are none."""
    inputs, floor, by_memory = _least(one, work, ceilings)
    calls, sets = timing.plan(floor, nbytes(inputs), one.case.in_place)
    keys = [jax.random.key(11 + i) for i in range(sets)]
    try:
        run, make = (one.programs[program].result() for program in ((work, name), "make"))
        cotangents = one.programs["cotangent"].result() if work == BOTH else lambda key: None
        measured = timing.measure(run, [(make(key), cotangents(key)) for key in keys], calls)
        row.temp_bytes = run.memory_analysis().temp_size_in_bytes
    except Exception as failure:  # noqa: BLE001 - one row says what went wrong, the others are still measured
        row.note, row.wrong = _reason(failure), True
        return
    row.us, row.spread_us, row.clock = measured
    row.roofline_share = floor / row.us
    if by_memory:
        row.gb_s = floor * ceilings[0] / row.us / 1e9
    else:
        row.tflop_s = one.case.flops(work) / row.us / 1e6


def _least(one: _Prepared, work: str, ceilings: tuple[float, float]) -> tuple[Any, float, bool]:
    """Shapes of the inputs, microseconds that the call takes at least, and whether memory bounds it.

    Each array is moved once.
    """
    inputs: Any = (one.shapes, one.cotangent) if work == BOTH else one.shapes
    by_memory = (nbytes(inputs) + nbytes(one.results) + _gradient_bytes(one, work)) / ceilings[0] * 1e6
    by_products = one.case.flops(work) / ceilings[1] * 1e6
    return inputs, max(by_memory, by_products), by_memory >= by_products


def _gradient_bytes(one: _Prepared, work: str) -> int:
    return sum(nbytes(one.shapes[i]) for i in one.case.wrt) if work == BOTH else 0


def _call(case: Case, f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: case.call(f, *inputs)


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


def _compiled(
    pool: ThreadPoolExecutor,
    f: Callable[..., Any],
    *shapes: Any,
    donate: tuple[int, ...] = (),
    options: dict[str, Any] = _CHECK_OPTIONS,
) -> Future:
    """f, traced at once and compiled in the background; what is wrong with it is raised by `result`."""
    try:
        return pool.submit(jax.jit(f, donate_argnums=donate).lower(*shapes).compile, options)
    except Exception as failure:  # noqa: BLE001 - a variant may raise anything, and one row says what
        failed: Future = Future()
        failed.set_exception(failure)
        return failed


def _reason(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
