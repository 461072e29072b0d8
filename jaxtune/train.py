"""The main job: `python -m jaxtune.train --config run.yaml`. Reads from top to bottom in the order of execution."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.checkpoint import Checkpoints, check_compatible, run_meta
from jaxtune.config import RunConfig
from jaxtune.config_io import check_files, dump_yaml, load_config
from jaxtune.data.loader import Dataset, Loader, build
from jaxtune.errors import UserError
from jaxtune.export import save_peft_adapter
from jaxtune.loading import fingerprint, load_model, load_tokenizer, read_hf_config, resolve_dtype, resolve_source
from jaxtune.lora import adaptation, count_parameters, init_lora
from jaxtune.metrics import MetricsWriter, Progress, format_bytes, host_peak_rss
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.samples import answer, encode_prompt
from jaxtune.step import StepConfig, batch_sharding, init_state, jit_eval_step, jit_train_step, make_mesh, replicated


def train(config: RunConfig, *, resume: bool = False, progress: Progress) -> Path:
    """Run one configuration to its end and return the directory of the PEFT adapter.

    Args:
        config: the whole run.
        resume: continue from the newest checkpoint in output.dir; otherwise that directory must not hold a run.
        progress: the display.

    Raises:
        UserError: something the user can fix; before any long work wherever that is possible.
    """
    # Checks that need neither model nor data.
    check_files(config)
    output = Path(config.output.dir).expanduser()
    checkpoints = Checkpoints(output / "checkpoints", config.output.save_total_limit)
    _check_output(output, checkpoints, resume)
    devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    if devices > len(jax.devices()):
        raise UserError(f"mesh asks for {devices} devices, this machine has {len(jax.devices())}; lower mesh.data")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)

    # Tokenizer and data: mistakes in them show before the weights are read.
    with progress.phase("find the model"):
        source = resolve_source(config.model)
        decoder = DecoderConfig.from_hf(read_hf_config(source))
        tokenizer = load_tokenizer(source)
    with progress.phase("encode the data"):
        train_data = build(config.data, tokenizer)
        eval_data = build(config.data, tokenizer, "eval") if config.data.eval is not None else None
        prompts = {prompt: encode_prompt(tokenizer, prompt) for prompt in config.output.sample_prompts}
    _check_vocabulary(train_data, eval_data, prompts, decoder)
    progress.note(_describe_data("train", train_data))
    if eval_data is not None:
        progress.note(_describe_data("eval", eval_data))
    if config.data.max_length > decoder.max_position:
        progress.note(
            f"data.max_length {config.data.max_length} is beyond the model's {decoder.max_position} positions"
        )
    settings = config.train
    loader = Loader(
        train_data.rows, settings.batch_size, settings.gradient_accumulation_steps, settings.seed, config.data.shuffle
    )
    total_steps = settings.max_steps or loader.steps(settings.num_train_epochs)
    if settings.warmup_steps >= total_steps:
        raise UserError(
            f"train.warmup_steps is {settings.warmup_steps}, but the run has {total_steps} updates: the learning rate "
            "would never reach its peak; lower train.warmup_steps, or raise train.num_train_epochs"
        )

    # Adapter and optimizer, new or from a checkpoint: what forbids to resume also shows before the weights are read.
    dtype = resolve_dtype(config.model.dtype)
    optimizer, schedule = make_optimizer(settings, total_steps), make_schedule(settings, total_steps)
    lora = init_lora(config.lora, decoder)
    state = jax.device_put(init_state(lora, optimizer, settings.seed, dtype), replicated(mesh))
    content = train_data.fingerprint, fingerprint(source)
    meta = run_meta(config, *content)
    if resume:
        state, _ = checkpoints.restore_latest(state, check=lambda meta: check_compatible(meta, config, *content))
        progress.note(f"resumed after step {int(state.step)}")
    first_step = int(state.step)
    if first_step > total_steps:
        raise UserError(f"cannot resume: step {first_step} is done, the run has {total_steps}; raise train.max_steps")

    # The frozen model.
    with progress.phase("load the model"):
        frozen = jax.device_put(load_model(config.model, dtype, source=source).frozen, replicated(mesh))
    frozen_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    progress.note(
        f"{decoder.model_type}: {decoder.num_layers} layers, computed in {dtype.name}, frozen weights "
        f"{format_bytes(frozen_bytes)}; {count_parameters(lora):,} trainable parameters"
    )

    # The step, compiled before the loop: no step can compile again, and its memory is known before the first.
    def place(batch: dict[str, np.ndarray]) -> Any:
        return jax.device_put(batch, batch_sharding(mesh))

    step_config = StepConfig(
        decoder,
        adaptation(config.lora),
        dtype,
        packed=config.data.packing,
        remat=settings.remat,
        # A loop over layers copies what it keeps for the backward pass in and out: 2 ms a layer of an 8B model.
        unroll=settings.remat == "none" and jax.default_backend() == "gpu",
        max_grad_norm=settings.max_grad_norm,
        loss_chunk=settings.loss_chunk,
    )
    batch = place(loader.batch(first_step))
    with progress.phase("compile the step"):
        jitted: Any = jit_train_step(optimizer, step_config, mesh)
        step = jitted.lower(state, frozen, batch).compile()
    step_bytes = step.memory_analysis().temp_size_in_bytes
    progress.note(f"one step holds {format_bytes(step_bytes)} beside weights and state")
    evaluate = partial(_held_out_loss, eval_data, settings.batch_size, place, jit_eval_step(step_config, mesh))

    def sample(when: str) -> None:
        for prompt, ids in prompts.items():
            text = answer(frozen, state.lora, tokenizer, ids, step_config, config.output.sample_tokens)
            progress.note(f"[{when}] {prompt}\n    {text}")
            metrics.write(int(state.step), sample=when, prompt=prompt, answer=text)

    # The loop.
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    with MetricsWriter(output / "metrics.jsonl", resumed_step=first_step if resume else None) as metrics:
        seconds = {name.replace(" ", "_") + "_seconds": value for name, value in progress.phases.items()}
        metrics.write(first_step, **seconds, step_temporary_bytes=step_bytes, frozen_bytes=frozen_bytes)
        eval_loss = None
        if first_step == 0:
            sample("before")
            if eval_data is not None:
                with progress.phase("measure the held-out loss"):
                    eval_loss = evaluate(state.lora, frozen)
                metrics.write(0, eval_loss=eval_loss)
                progress.note(f"held-out loss before training: {eval_loss:.4f}")
        first_eval_loss, tokens, elapsed_total = eval_loss, 0, 0.0
        progress.start(total_steps, first_step)
        for done in range(first_step + 1, total_steps + 1):
            started = time.perf_counter()
            state, scalars = step(state, frozen, batch)
            batch_tokens = int(np.count_nonzero(batch["segment_ids"]))
            if done < total_steps:
                batch = place(loader.batch(done))
            values: dict[str, Any] = {name: float(value) for name, value in scalars.items()}
            elapsed = time.perf_counter() - started
            tokens, elapsed_total = tokens + batch_tokens, elapsed_total + elapsed
            values |= {"learning_rate": float(schedule(done - 1)), "device_bytes": _device_peak()}
            values |= {"step_seconds": elapsed, "tokens_per_second": batch_tokens / elapsed}
            due = settings.eval_steps is not None and done % settings.eval_steps == 0
            if eval_data is not None and (due or done == total_steps):
                values["eval_loss"] = eval_loss = evaluate(state.lora, frozen)
            metrics.write(done, **values)
            progress.update(done, values)
            _check_finite(done, values, checkpoints)
            if config.output.save_steps is not None and done % config.output.save_steps == 0 and done < total_steps:
                checkpoints.save(done, state, meta)
        if first_step < total_steps:
            sample("after")

    # What the run leaves.
    if checkpoints.latest() != total_steps:
        checkpoints.save(total_steps, state, meta)
    adapter = output / "adapter"
    save_peft_adapter(adapter, state.lora, config.lora, source, overwrite=True)
    progress.summary(
        {
            "held-out loss": _change(first_eval_loss, eval_loss),
            "tokens per second": f"{tokens / elapsed_total:,.0f}" if elapsed_total else "-",
            "peak memory": f"device {format_bytes(_device_peak() or 0)}, host {format_bytes(host_peak_rss())}",
            "adapter": str(adapter),
            "metrics": str(output / "metrics.jsonl"),
        }
    )
    return adapter


def _check_output(output: Path, checkpoints: Checkpoints, resume: bool) -> None:
    """Refuse a directory with files that this run would overwrite, without those it needs, or that cannot be made."""
    remains = ", ".join(name for name in ("config.yaml", "metrics.jsonl", "adapter") if (output / name).exists())
    has_run, elsewhere = checkpoints.latest() is not None, "name another with --set output.dir=..."
    if resume and not has_run:
        raise UserError(f"--resume: no complete checkpoint in {checkpoints.directory}; start in an empty output.dir")
    if has_run and not resume:
        raise UserError(f"output.dir {output} holds a run already; continue it with --resume, or {elsewhere}")
    if remains and not resume:
        raise UserError(f"output.dir {output} holds {remains}, but no checkpoint; delete what is there, or {elsewhere}")
    above = next(path for path in (output, *output.parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"output.dir {output} cannot be written: {above} is a file or read-only; {elsewhere}")


def _check_vocabulary(
    train_data: Dataset, eval_data: Dataset | None, prompts: Mapping[str, list[int]], decoder: DecoderConfig
) -> None:
    tokens = [data.rows.tokens.max() for data in (train_data, eval_data) if data is not None]
    largest = max(tokens + [max(ids) for ids in prompts.values()])
    if largest >= decoder.vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {decoder.vocab_size} entries; "
            "use the tokenizer that belongs to the model"
        )


def _describe_data(name: str, data: Dataset) -> str:
    s = data.statistics
    left_out = ", ".join(
        f"{count} {what}"
        for count, what in ((s.truncated, "truncated"), (s.dropped, "dropped as too long"), (s.unlearnt, "unlearnt"))
        if count
    )
    return (
        f"{name}: {s.documents:,} documents of {s.records:,} records{f' ({left_out})' if left_out else ''}, "
        f"{s.tokens:,} tokens ({s.learnt_tokens:,} learnt) in {s.rows:,} rows, {s.fill:.1%} full"
    )


def _held_out_loss(
    data: Dataset | None, batch_size: int, place: Callable[[Any], Any], step: Callable[..., Any], lora: Any, frozen: Any
) -> float:
    """The mean loss over all learnt tokens of a set."""
    assert data is not None
    total = weight = 0.0
    for rows in data.eval_batches(batch_size):
        loss, count = step(lora, frozen, place({name: values[None] for name, values in rows.items()}))
        total, weight = total + float(loss), weight + float(count)
    return total / weight


def _check_finite(step: int, values: Mapping[str, float], checkpoints: Checkpoints) -> None:
    # A float16 gradient may overflow while the loss scale is found, down to 1: such a step changes nothing.
    names = ("loss", "eval_loss") if values.get("loss_scale", 1.0) > 1.0 else ("loss", "grad_norm", "eval_loss")
    bad = [name for name in names if not math.isfinite(values.get(name, 0.0))]
    if bad:
        saved = checkpoints.latest()
        kept = "there is no checkpoint" if saved is None else f"the newest checkpoint is of step {saved}"
        raise UserError(f"step {step}: {' and '.join(bad)} not finite; {kept}. Lower train.learning_rate")


def _device_peak() -> int | None:
    """The allocator's peak of the first device, in bytes; None where the device keeps no such count (a CPU)."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return "not measured"
    return f"{after:.4f}" if before is None else f"{before:.4f} -> {after:.4f} ({(after / before - 1):+.1%})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m jaxtune.train", description="Fine-tune a model with (Q)LoRA.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override: train.max_steps=5")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in output.dir")
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and why an op's implementation is used")
    options = parser.parse_args(arguments)
    # By force, since an imported library has set up logging already.
    logging.basicConfig(format="%(name)s: %(message)s", force=True)
    for package in ("jaxtune", "pallas_kernels"):
        logging.getLogger(package).setLevel(logging.INFO if options.debug else logging.WARNING)
    # Read when the GPU client starts: memory is taken as it is needed instead of three quarters of the card at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        config = load_config(options.config, options.set)
        if config.output.compile_cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(Path(config.output.compile_cache).expanduser()))
        with Progress(config.train.logging_steps) as progress:
            train(config, resume=options.resume, progress=progress)
    except (UserError, NotImplementedError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if options.debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: {error}\nLower train.batch_size or data.max_length, or set train.remat to full", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
