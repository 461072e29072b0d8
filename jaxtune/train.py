"""The main job: `python -m jaxtune.train --config run.yaml`. Reads from top to bottom in the order of execution."""

from __future__ import annotations

import sys

from jaxtune.command import main, process

if __name__ == "__main__":
    # Before the imports below, which take seconds: help and mistakes in the configuration are answered at once.
    sys.exit(process())

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.ahead import Beside, Step
from jaxtune.base import BaseModel, find_base
from jaxtune.checkpoint import check_compatible, run_meta
from jaxtune.compile_cache import use_compile_cache
from jaxtune.config import RunConfig
from jaxtune.config_io import check_files, fingerprint, to_dict
from jaxtune.data.dataset import Dataset, build, eval_sets
from jaxtune.data.loader import Loader, Position, Prefetch
from jaxtune.data.report import describe_all
from jaxtune.decoding import Generator
from jaxtune.device_memory import check_limit, limit_memory
from jaxtune.device_usage import device_usage, start_records
from jaxtune.devices import this_device
from jaxtune.environment import versions
from jaxtune.errors import UserError
from jaxtune.evaluation import check_rouge, held_out
from jaxtune.examiner import Examiner
from jaxtune.finish import save_last
from jaxtune.host_embedding import HostEmbedding
from jaxtune.launch import Launch
from jaxtune.loading import read_hf_config
from jaxtune.lora import count_parameters, init_lora
from jaxtune.memory import first_that_fits, out_of_memory, peaks, tree_bytes
from jaxtune.mesh import check_mesh, own_rows, place_batch, place_frozen, place_state, placing
from jaxtune.metrics import MetricsWriter, Progress, format_bytes, format_change, host_rss
from jaxtune.nonfinite import NonfiniteUpdates, trace
from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.parts import Parts
from jaxtune.planning import check_plan, with_mesh
from jaxtune.preflight import check_devices, check_model, count_steps
from jaxtune.processes import check_same, is_first, joined, largest, own_copy
from jaxtune.report import write_report
from jaxtune.run_directory import Resume, RunDirectory
from jaxtune.start import start_from
from jaxtune.step import TrainState, batch_sharding, init_state, jit_eval_step, jit_train_step, make_mesh
from jaxtune.stopping import StopRequests
from jaxtune.structure import loaded_structure, step_settings
from jaxtune.trackers import check_installed, open_trackers
from jaxtune.unchanged import digest, unchanged

__all__ = ["Outcome", "fit", "main", "run", "train"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run made. adapter: PEFT's directory. lora: the trained tree. steps: updates done. eval_loss: the last."""

    adapter: Path
    lora: Any
    steps: int
    eval_loss: float | None


def run(config: RunConfig, *, resume: Resume = False, launch: Launch | None = None) -> Outcome:
    """`train` with what belongs to a command: the display, the compile cache, which is the whole process's, and the
    other processes of the run (`launch`)."""
    limit_memory(config.train.memory_limit)
    if config.output.compile_cache is not None:
        use_compile_cache(config.output.compile_cache)
    first = launch is None or launch.process == 0
    with Progress(config.train.logging_steps, quiet=not first) as progress, joined(launch, progress.note):
        return train(config, resume=resume, progress=progress)


def train(config: RunConfig, *, resume: Resume = False, progress: Progress) -> Outcome:
    """Run one configuration to its end: find the model, encode the data, `fit`.

    Args:
        config: the whole run.
        resume: True continues from the newest checkpoint in output.dir, "auto" does so if there is one; otherwise that
            directory must not hold a run.
        progress: the display.

    Raises:
        UserError: something the user can fix; before any long work wherever that is possible.
        Interrupted: stopped by SIGINT or SIGTERM; what was done is saved.
    """
    check_files(config)
    check_installed(config.output.report_to)
    if config.train.eval_answers is not None:
        check_rouge()
    check_devices(config.mesh)
    check_limit(config.train.memory_limit)
    with RunDirectory(config, resume) as directory:
        with progress.phase("find the model"):
            base, lora = start_from(config.lora, find_base(config.model))
        if config.mesh.auto:
            config, reason = with_mesh(config, read_hf_config(base.source), this_device(), jax.device_count())
            progress.note(reason)
        with progress.phase("encode the data"):
            train_data, eval_data = build(config.data, base.tokenizer), eval_sets(config.data, base.tokenizer)
        return fit(config, base, train_data, eval_data, lora=lora, directory=directory, progress=progress)


def fit(
    config: RunConfig,
    base: BaseModel,
    train_data: Dataset,
    eval_data: Dataset | Mapping[str, Dataset] | None = None,
    *,
    lora: Any = None,
    directory: RunDirectory,
    progress: Progress,
) -> Outcome:
    """Train an adapter of `base`, from the start or from the directory's newest checkpoint, and write it.

    Args:
        config: adapter, step, loop and output; its model and data were turned into the following.
        base: what is tuned. train_data: on what. eval_data: what measures it, one set or several by name.
        lora: the adapter's tree to start from; None for a new one.
        directory: where the run leaves its files, entered. progress: the display.

    Raises:
        UserError, Interrupted: as `train`.
    """
    settings, decoder, output, checkpoints = config.train, base.decoder, config.output, directory.checkpoints
    check_mesh(config.mesh, decoder, config.data.max_length)
    mesh = make_mesh(**config.mesh.axes)
    examiner = Examiner.of(config, base, eval_data)
    check_model(config, decoder, [train_data, *examiner.sets.values()], examiner.prompts, progress)
    described = describe_all({"train": train_data, **examiner.sets})
    for text in described:
        progress.note(text)
    share = own_rows(mesh, settings.batch_size)
    loader = Loader(train_data, settings.batch_size, settings.gradient_accumulation_steps, settings.seed, share=share)
    total_steps = count_steps(settings, loader)

    # Adapter and optimizer, new or from a checkpoint: what forbids to resume also shows before the weights are read.
    optimizer, schedule = make_optimizer(settings, total_steps), make_schedule(settings, total_steps)
    lora = init_lora(config.lora, decoder) if lora is None else lora
    state = init_state(lora, optimizer, settings.seed, base.dtype)
    state = place_state(state, mesh, paged=settings.is_paged)
    contents = train_data.fingerprint, base.fingerprint, base.dtype.name
    check_same(configuration=fingerprint(config), training_data=train_data.fingerprint, base_model=base.fingerprint)
    meta = run_meta(config, *contents)
    state, position = _restored(state, config, contents, total_steps, directory, progress)
    first_step = int(state.step)

    # The frozen model, unless it is known beforehand that it is too large.
    hf_config = read_hf_config(base.source)
    plan = check_plan(config, hf_config)
    progress.note(plan.short())
    memory = {"adapter": tree_bytes(state.lora)}
    if not settings.is_paged:
        memory["optimizer"] = tree_bytes(state.opt_state)

    def load(check: Callable[..., None]) -> Any:
        with progress.phase("load the model"), out_of_memory("loading the model", memory, config):
            frozen = base.load(placing(mesh, decoder), progress=check)
            embedding = HostEmbedding(frozen) if config.model.embedding_on_host else None
            frozen, parts = place_frozen(frozen if embedding is None else embedding.without_table, state, mesh)
        return frozen, embedding, parts, {"after loading": device_usage()}

    def step_of(policy: str, frozen: Any, batch: Any, parts: Parts | None) -> Step:
        step_config = dataclasses.replace(step_settings(config, decoder, base.dtype, policy), parts=parts)
        jitted = jit_train_step(optimizer, step_config, mesh)
        return Step(jitted, step_config, settings, (state, frozen, batch), progress)

    # The step of one device, from shapes: beside the loading where the compile cache has it, and else before, since XLA
    # chooses between products by timing them, for which the device has to be idle and to have room.
    ahead = None
    with out_of_memory("compiling the step", memory, config):
        if mesh.size == 1:
            structure = loaded_structure(config, base.hf_config or hf_config, base.dtype, state, mesh)
            memory["frozen weights"] = tree_bytes(structure[0])
            ahead = step_of(plan.candidates[0], *structure, None)
            if not ahead.is_cached():
                ahead.compile()
        with Beside(load) as loading, Beside(lambda _: versions()) as asked:
            if ahead is not None:
                ahead.compile()
            (frozen, embedding, parts, usage), found = loading.result(), asked.result()
    memory["frozen weights"] = tree_bytes(frozen)
    progress.note(
        f"{decoder.model_type}: {decoder.num_layers} layers, computed in {base.dtype.name}, frozen weights "
        f"{format_bytes(memory['frozen weights'])}; {count_parameters(lora):,} trainable parameters"
    )

    # The step, compiled before the loop: no step can compile again, and its memory is known before the first.
    def place(batch: dict[str, np.ndarray]) -> Any:
        rows = {} if embedding is None else {"embedded": embedding.rows(batch["tokens"], batch_sharding(mesh))}
        return {**place_batch(batch, mesh, settings.batch_size), **rows}

    def placed(position: Position) -> Iterator[tuple[dict[str, np.ndarray], Any, Position]]:
        for host_batch, after in loader.batches(position):
            yield host_batch, place(host_batch), after

    host_batch, batch, after_batch = next(placed(position))

    def of_policy(policy: str) -> Step:
        if ahead is not None and policy == ahead.config.remat and ahead.takes(state, frozen, batch):
            return ahead
        return step_of(policy, frozen, batch, parts)

    chosen, step = first_that_fits(plan.candidates, of_policy, memory, config, progress)
    step_config = chosen.config
    eval_step = jit_eval_step(step_config, mesh)

    usage["after compiling"] = device_usage()

    def generator() -> Generator:
        weights = own_copy(frozen) if embedding is None else embedding.whole
        return Generator(weights, own_copy(state.lora), decoder, step_config.adaptation, base.dtype)

    def evaluate() -> dict[str, float]:
        values = held_out(examiner.sets, settings.batch_size, place, eval_step, state.lora, frozen, share)
        return values | examiner.answer_questions(generator)

    def sample(when: str) -> None:
        for prompt, text in examiner.answer_prompts(generator):
            progress.note(f"[{when}] {prompt}\n    {text}")
            metrics.write(int(state.step), sample=when, prompt=prompt, answer=text)

    saved_step, measured_step = first_step, 0

    def save() -> None:
        nonlocal saved_step
        if int(state.step) != saved_step:
            of_step: dict[str, Any] = {"data_position": dataclasses.asdict(position)}
            if measured_step == int(state.step):
                of_step["eval_loss"] = eval_loss
            checkpoints.save(int(state.step), state, {**meta, **of_step})
            saved_step = int(state.step)

    # The loop.
    directory.start()
    trackers = open_trackers(output.report_to if is_first() else (), directory.path, to_dict(config))
    records = directory.metrics if is_first() else None
    with (
        MetricsWriter(records, first_step if directory.resumes else None, trackers) as metrics,
        out_of_memory("training", memory, config),
        StopRequests() as stop,
        Prefetch(placed(after_batch), ahead=1) as batches,
    ):
        for record in start_records(plan, step_config.remat, step, memory, usage, progress.phases):
            metrics.write(first_step, **record)
        metrics.write(first_step, data=described, versions={"device": plan.device.kind, **found})
        eval_loss = None
        if first_step == 0:
            sample("before")
            if examiner.sets:
                with progress.phase("measure the held-out loss"):
                    measured = evaluate()
                metrics.write(0, **measured)
                eval_loss = measured["eval_loss"]
                progress.note(f"held-out loss before training: {eval_loss:.4f}")
        first_eval_loss, tokens, elapsed_total = eval_loss, 0, 0.0
        tracing = partial(trace, frozen=frozen, config=step_config, mesh=mesh, place=place)
        nonfinite = NonfiniteUpdates(settings.on_nonfinite, directory.path, tracing, place)
        before = digest(state.lora) if first_step == 0 else None
        progress.start(total_steps, first_step)
        for done in range(first_step + 1, total_steps + 1):
            if received := largest(stop.received or 0):
                save()
                raise stop.interrupted(received, int(state.step), total_steps)
            started, used, position_before = time.perf_counter(), host_batch, position
            state, scalars = step(state, frozen, batch)
            batch_tokens, position = loader.tokens(position), after_batch
            dispatched = time.perf_counter()
            if done < total_steps:
                # Sent already by a thread of its own: a call of the step returns when the step is all but done.
                host_batch, batch, after_batch = next(batches)
            values: dict[str, Any] = {"input_seconds": time.perf_counter() - dispatched}
            values |= {name: float(value) for name, value in scalars.items()}
            elapsed = time.perf_counter() - started
            tokens, elapsed_total = tokens + batch_tokens, elapsed_total + elapsed
            values |= {"learning_rate": float(schedule(done - 1)), "host_bytes": host_rss(), **device_usage()}
            values |= {"step_seconds": elapsed, "tokens_per_second": batch_tokens / elapsed}
            if plan.mfu_flops is not None:
                values["mfu"] = plan.useful_flops / elapsed / plan.mfu_flops
            due = settings.eval_steps is not None and done % settings.eval_steps == 0
            if examiner.sets and (due or done == total_steps):
                values |= evaluate()
                eval_loss, measured_step = values["eval_loss"], done
            try:
                skipped = nonfinite.met(done, values, used, state)
            except UserError:
                # As if the update had not been tried, so that the run can go on from there.
                metrics.write(done, **values)
                state, position = dataclasses.replace(state, step=jnp.int32(done - 1)), position_before
                save()
                raise
            if skipped is not None:
                progress.note(skipped)
                values["skipped"] = 1
            metrics.write(done, **values)
            progress.update(done, values)
            _check_eval_loss(done, values)
            applied = skipped is None and math.isfinite(values["grad_norm"])
            if before is not None and applied and values["learning_rate"] > 0:
                if (remark := unchanged(before, state.lora)) is not None:
                    progress.note(remark)
                before = None
            if output.save_steps is not None and done % output.save_steps == 0:
                save()
        if first_step < total_steps:
            sample("after")
        lora = save_last(save, state, config, base, directory, progress)

    # What the run leaves.
    adapter = directory.path / "adapter"
    if not is_first():
        return Outcome(adapter, lora, int(state.step), eval_loss)
    progress.summary(
        {
            "held-out loss": format_change(first_eval_loss, eval_loss),
            "tokens per second": f"{tokens / elapsed_total:,.0f}" if elapsed_total else "-",
            "peak memory": peaks(),
            "adapter": str(adapter),
            "metrics": str(directory.metrics),
            "report": str(write_report(directory.path)),
        }
    )
    return Outcome(adapter, lora, int(state.step), eval_loss)


def _restored(
    state: TrainState,
    config: RunConfig,
    contents: tuple[str, str, str],
    total_steps: int,
    directory: RunDirectory,
    progress: Progress,
) -> tuple[TrainState, Position]:
    """The state and the place in the data to go on from: the newest checkpoint's, or the beginning.

    contents: as `run_meta` takes them, the training data's fingerprint first.
    """
    position = Position()
    if directory.resumes:
        state, meta_then = directory.checkpoints.restore_latest(
            state, check=lambda meta: check_compatible(meta, config, *contents)
        )
        position = Position(**meta_then["data_position"])
        progress.note(f"resumed after step {int(state.step)}")
        if meta_then["contents"]["data"] != contents[0]:
            position = Position(position.epoch + 1)
            progress.note(
                f"the data have changed (data.accept_changed): the place in the data before is given up, and step "
                f"{int(state.step) + 1} of {total_steps} begins an epoch of these"
            )
    elif directory.restarts:
        progress.note(f"started again: the start before this one left no checkpoint in {directory.path}")
    if (done := int(state.step)) > total_steps:
        raise UserError(f"cannot resume: step {done} is done, the run has {total_steps}; raise train.max_steps")
    return state, position


def _check_eval_loss(step: int, values: Mapping[str, float]) -> None:
    if not math.isfinite(values.get("eval_loss", 0.0)):
        raise UserError(f"step {step}: eval_loss not finite; lower train.learning_rate, and check the held-out records")
