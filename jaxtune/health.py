"""The parts of the health check: what is installed, what would run, whether it computes what it should, what fits."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.devices import Device
from jaxtune.environment import nvidia_smi, versions
from jaxtune.generation_plan import plan_generation
from jaxtune.loading import resolve_dtype
from jaxtune.memory import device_peak
from jaxtune.metrics import format_bytes
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer
from jaxtune.planning import Plan, make_plan, with_mesh
from jaxtune.step import accumulate, init_state, train_step
from jaxtune.structure import (
    batch_structure,
    compile_step,
    frozen_structure,
    state_structure,
    step_bytes,
    step_settings,
)
from pallas_kernels._device import assume_capability
from pallas_kernels._dispatch import record_choices
from pallas_kernels.nf4 import NF4Tensor, dequantize

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
# Widths that every kernel takes, small enough for a step within seconds on a CPU.
_SMALL = LLAMA_3_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One part's outcome. ok: passed. lines: for people. values: the same for programs."""

    name: str
    ok: bool
    lines: tuple[str, ...]
    values: Mapping[str, Any]


def qlora_run(batch: int, length: int, *, r: int = 16, remat: Any = "full") -> RunConfig:
    """The QLoRA run that the check speaks of; its model and data are made up."""
    return RunConfig(
        ModelConfig("random weights"),
        DataConfig("random tokens", max_length=length, packing=False),
        OutputConfig("nowhere"),
        LoraConfig(r=r, lora_alpha=r),
        TrainConfig(batch_size=batch, remat=remat),
    )


def check_versions() -> Check:
    """Python, the packages that matter, and the GPU driver."""
    found = versions()
    return Check("versions", True, ("  ".join(f"{name} {value}" for name, value in found.items()),), found)


def check_devices() -> Check:
    """What JAX runs on; a GPU that JAX does not use is a failure."""
    devices = [{"kind": d.device_kind, "platform": d.platform, **(d.memory_stats() or {})} for d in jax.devices()]
    lines = [
        f"{d['kind']} ({d['platform']})"
        + (f": {format_bytes(d['bytes_limit'])} for this process" if "bytes_limit" in d else "")
        for d in devices
    ]
    unused = nvidia_smi("name") if jax.default_backend() != "gpu" else None
    if unused is not None:
        lines.append(f"JAX does not use the {unused} of this machine: install jaxtune[cuda13] or jaxtune[cuda12]")
    return Check("devices", unused is None, tuple(lines), {"devices": devices, "unused": unused})


def check_mesh(device: Device) -> Check:
    """What `mesh: auto` would be here for Llama-3-8B, and how fast the devices exchange data."""
    count = jax.device_count()
    run = dataclasses.replace(qlora_run(4 * count, 2048), mesh=MeshConfig(auto=True))
    chosen, reason = with_mesh(run, LLAMA_3_8B, device, count)
    values: dict[str, Any] = {"devices": count, "mesh": chosen.mesh.axes}
    lines = [f"for Llama-3-8B, {chosen.train.batch_size} x 2048 tokens: {reason}"]
    if count > 1:
        values["bytes_per_second"] = rate = _gathering_rate()
        lines.append(f"gathering, each of the {count} devices receives {rate / 1e9:,.1f} GB/s")
    return Check("mesh", True, tuple(lines), values)


def _gathering_rate() -> float:
    """Bytes a second that each device receives while all gather one array."""
    mesh = jax.make_mesh((jax.device_count(),), ("every",), axis_types=(AxisType.Auto,))
    parts = jnp.zeros((mesh.size, 2**22), jnp.float32, device=NamedSharding(mesh, P("every")))
    gather: Any = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(gather(parts))
        seconds.append(time.perf_counter() - started)
    return parts.nbytes * (mesh.size - 1) / mesh.size / min(seconds)


def check_cache(directory: str) -> Check:
    """Whether compiled programs can be kept."""
    path = Path(directory).expanduser()
    above = next(parent for parent in (path, *path.parents) if parent.exists())
    writable = above.is_dir() and os.access(above, os.W_OK)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    line = f"{path}: {format_bytes(size)}" if writable else f"{path} cannot be written; set output.compile_cache"
    return Check("compile cache", writable, (line,), {"path": str(path), "bytes": size})


def check_implementations(device: Device) -> Check:
    """What a Llama-3-8B train step runs on a device, op by op, from tracing it; the device need not be here."""
    config, dtype = qlora_run(4, 2048), resolve_dtype(device.compute_dtype)
    decoder = DecoderConfig.from_hf(LLAMA_3_8B)
    step = partial(
        train_step,
        optimizer=make_optimizer(config.train, 1000),
        config=step_settings(config, decoder, dtype, config.train.remat),
    )
    arguments = state_structure(config, decoder, dtype), frozen_structure(LLAMA_3_8B, config.model, dtype)
    with assume_capability(device.capability), record_choices(trace_as="xla") as choices:
        jax.eval_shape(step, *arguments, batch_structure(config))
    found = {(choice.op, choice.implementation): dict(choice.refused) for choice in choices}
    lines = tuple(
        f"{op}: {implementation}" + "".join(f"; not {name}: {reason}" for name, reason in refused.items())
        for (op, implementation), refused in sorted(found.items())
    )
    values = [{"op": op, "implementation": name, "refused": refused} for (op, name), refused in sorted(found.items())]
    return Check("implementations", bool(found), lines, {"ops": values})


def check_step(device: Device) -> Check:
    """Loss and adapter gradients of a small QLoRA model, on the device, against float32 and decoded weights on the CPU.

    The error is the largest of any array, over the array's norm. It may be 1.5 times that of the plain XLA
    implementations in the same dtype, plus rounding of float32, and 64 units in the last place.
    """
    config = qlora_run(2, 128, r=8)
    dtype = resolve_dtype(device.compute_dtype)
    decoder = DecoderConfig.from_hf(_SMALL)
    frozen = jax.device_get(random_arrays(frozen_structure(_SMALL, config.model, dtype), seed=1))
    lora = jax.device_get(random_arrays(state_structure(config, decoder, dtype).lora, seed=2))
    tokens = np.random.default_rng(3).integers(0, decoder.vocab_size, (2, 128), dtype=np.int32)
    batch: dict[str, Any] = {
        "tokens": tokens[None],
        "targets": np.roll(tokens, -1, axis=1)[None],
        "positions": np.broadcast_to(np.arange(128, dtype=np.int32), (1, 2, 128)),
        "segment_ids": np.ones((1, 2, 128), np.int32),
        "loss_weights": np.ones((1, 2, 128), np.float32),
    }

    def outcome(weights: Any, compute: Any) -> Any:
        settings = step_settings(config, decoder, jnp.dtype(compute), config.train.remat)
        step = jax.jit(lambda lora, weights: accumulate(lora, weights, batch, settings, None, 1.0))
        return jax.device_get(step(lora, weights))

    with assume_capability(None), jax.default_device(jax.devices("cpu")[0]):
        truth = outcome(_decoded(frozen), np.float32)
        expected = _largest_error(outcome(frozen, dtype), truth)
    error = _largest_error(outcome(frozen, dtype), truth)
    limit = min(1.5 * expected + 1e-5, 64 * float(jnp.finfo(dtype).eps))
    line = f"loss and gradients in {dtype.name}: error {error:.1e} of float32's, limit {limit:.1e}"
    return Check("a QLoRA step", bool(error <= limit), (line,), {"error": error, "limit": limit, "dtype": dtype.name})


def check_large_step(device: Device) -> Check:
    """Memory and time of a QLoRA step of Llama-3-8B with random weights, where the device can hold it."""
    config = qlora_run(4, 2048)
    plan = make_plan(config, LLAMA_3_8B, device)
    leanest = min(plan.reaches, key=lambda reach: reach.memory.peak)
    if not plan.fits and leanest.largest_batch:
        config = qlora_run(1, 2048, remat=leanest.policy)
        plan = make_plan(config, LLAMA_3_8B, device)
    if device.capability is None or not plan.fits:
        return planned_step(plan)
    dtype = resolve_dtype(plan.dtype)
    compiled = compile_step(config, LLAMA_3_8B, dtype, plan.policy)
    losses, best = timed_steps(compiled, config, LLAMA_3_8B, dtype)
    peak, finite = device_peak() or step_bytes(compiled), bool(np.isfinite(losses).all())
    useful = plan.useful_flops / best
    line = (
        f"Llama-3-8B, {config.train.batch_size} x 2048 tokens, remat {config.train.remat}: {format_bytes(peak)} of "
        f"device memory (planned {format_bytes(plan.memory.peak)}), {plan.tokens_per_step / best:,.0f} tokens/s, "
        f"{useful / 1e12:,.0f} TFLOP/s of useful work ({useful / device.flops:.0%} of the data sheet's)"
    )
    values = {"peak_bytes": peak, "planned_bytes": plan.memory.peak, "seconds": best, "finite": finite}
    lines = (line,) if finite else (line, f"losses of its steps: {', '.join(f'{loss:.4f}' for loss in losses)}")
    return Check("a Llama-3-8B step", finite, lines, values)


def timed_steps(
    compiled: jax.stages.Compiled, config: RunConfig, hf_config: Mapping[str, Any], dtype: Any, count: int = 5
) -> tuple[list[float], float]:
    """Losses of a compiled step on random weights, and the seconds of the quickest.

    The optimizer's state is a new run's: a random one may be such as no gradients leave behind, and give no number.
    """
    frozen = random_arrays(frozen_structure(hf_config, config.model, dtype), seed=1)
    lora = random_arrays(state_structure(config, DecoderConfig.from_hf(hf_config), dtype).lora, seed=2)
    state = init_state(lora, make_optimizer(config.train, 1000), config.train.seed, dtype)
    batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batch_structure(config))
    losses, seconds = [], []
    for _ in range(count):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - started)
    return losses, min(seconds)


def planned_step(plan: Plan) -> Check:
    """The same from the plan alone, with the formula of its times."""
    lines = [f"estimated, not measured: Llama-3-8B NF4, r=16, {plan.config.train.batch_size} x 2048 tokens"]
    for reach in plan.reaches:
        verdict = "fits" if reach.fits else "does not fit"
        lines.append(
            f"remat {reach.policy}: {format_bytes(reach.memory.peak)} {verdict} in {format_bytes(plan.device.usable)}; "
            f"{plan.tokens_per_step / reach.seconds:,.0f} tokens/s; at most {reach.largest_batch} rows of 2048, or one "
            f"of {reach.longest_row:,} tokens"
        )
    lines.append("seconds = flops / (0.75 x data sheet's rate) + bytes between products / (0.75 x bandwidth)")
    ok = plan.device.capability is None or any(reach.longest_row >= 2048 for reach in plan.reaches)
    return Check("a Llama-3-8B step", ok, tuple(lines), plan.to_json())


def planned_generation(device: Device) -> Check:
    """What answers of Llama-3-8B in 512 tokens would take of a device, and how fast they could be at most."""
    lines, values = ["estimated, not measured: Llama-3-8B NF4, r=16, one row of 512 tokens, prompt included"], {}
    # Where the device's memory is the host's, nothing is saved by holding the table there.
    on_host = not device.shared
    whole = "head in 16 bits, embedding in host memory" if on_host else "head and embedding in 16 bits"
    heads: dict[str, Literal["dtype", "nf4"]] = {whole: "dtype", "--head nf4": "nf4"}
    sliced = device.capability is not None and device.capability >= 8.0
    for name, head in heads.items():
        model, dtype = ModelConfig("random weights", head=head, embedding_on_host=on_host), device.compute_dtype
        plan = plan_generation(
            LLAMA_3_8B, model, LoraConfig(r=16), resolve_dtype(dtype), prompt=448, new=64, sliced=sliced
        )
        rate, verdict = plan.most_tokens_per_second(device), "fits" if plan.peak <= device.usable else "does not fit"
        room = format_bytes(device.usable)
        lines.append(f"{name}: {format_bytes(plan.peak)} {verdict} in {room}; at most {rate:,.0f} tokens/s")
        values[name] = {"peak_bytes": plan.peak, "most_tokens_per_second": round(rate, 1)}
    lines.append("tokens/s = bandwidth / bytes of all weights but the embedding")
    return Check("generation", True, tuple(lines), values)


def random_arrays(structure: Any, seed: int, embedding: float = 0.1) -> Any:
    """Arrays of a structure, made on the default device leaf by leaf: such values that every layer has its say.

    embedding: deviation of the embedding's values; the larger, the more of a token is left behind the last layer.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(structure)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def make(path: tuple[Any, ...], leaf: Any, key: Any) -> jax.Array:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        return _random(tuple(leaf.shape), np.dtype(leaf.dtype).name, name, embedding, key)

    return jax.tree.unflatten(tree, [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys)])


# Elements that are drawn at once.
_AT_ONCE = 2**24


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _random(shape: tuple[int, ...], dtype: str, name: str, embedding: float, key: Any) -> jax.Array:
    if len(shape) > 1 and math.prod(shape) > _AT_ONCE:
        # A part at a time: generators need several times what they make.
        part, keys = partial(_random, shape[1:], dtype, name, embedding), jax.random.split(key, shape[0])
        # Of equal parts: where some rows are left over, all of them are copied once more.
        most = max(1, _AT_ONCE // math.prod(shape[1:]))
        return jax.lax.map(part, keys, batch_size=max(n for n in range(1, most + 1) if shape[0] % n == 0))
    if dtype == "uint8":
        return jax.random.bits(key, shape, jnp.uint8)
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    mean = {"scale": 1.0, "absmax": 0.04, "nested_offset": 0.04}.get(name, 0.0)
    deviation = {"scale": 0.1, "absmax": 0.001, "nested_offset": 0.001, "nested_absmax": 0.01, "embedding": embedding}
    values = mean + deviation.get(name, 0.02) * jax.random.normal(key, shape, dtype)
    # Second moments and scales are not negative.
    return jnp.abs(values) if name == "v" or name.endswith("absmax") else values


def _decoded(frozen: Any) -> Any:
    """Every weight in float32."""

    def one(leaf: Any) -> Any:
        return np.asarray(dequantize(leaf) if isinstance(leaf, NF4Tensor) else leaf, np.float32)

    return jax.tree.map(one, frozen, is_leaf=lambda leaf: isinstance(leaf, NF4Tensor))


def _largest_error(values: Any, truth: Any) -> float:
    errors = jax.tree.map(lambda ours, true: np.linalg.norm(ours - true) / np.linalg.norm(true), values, truth)
    return float(np.max(jax.tree.leaves(errors)))


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """A check's outcome, where it raises its failure."""
    try:
        return check()
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError, NotImplementedError) as error:
        line = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        return Check(name, False, (line,), {"error": line})
