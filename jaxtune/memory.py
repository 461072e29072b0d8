"""What takes a run's memory, by component, and what to change where there is not enough of it."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax

from jaxtune.config import RunConfig
from jaxtune.config_checks import parse_bytes
from jaxtune.errors import UserError
from jaxtune.metrics import Progress, format_bytes, host_peak_rss
from jaxtune.processes import everywhere

# Of a run's memory: what a step holds beside weights and state.
IN_STEP = "activations, gradients and logits"


class Compilable(Protocol):
    """What can be compiled."""

    def compile(self) -> jax.stages.Compiled: ...


T = TypeVar("T", bound=Compilable)


def tree_bytes(tree: Any) -> int:
    """Bytes of one device's part of all leaves, which is the whole of them on one device."""
    parts = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def device_peak() -> int | None:
    """The allocator's peak of the first device, in bytes; None where the device keeps no such count (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def peaks() -> str:
    """Peaks of device and host; of the host alone where the device's memory is the host's, or is not counted."""
    device = device_peak()
    return (f"device {format_bytes(device)}, " if device else "") + f"host {format_bytes(host_peak_rss())}"


def give_back_freed() -> None:
    """Give what this process has freed back to the system, where the C library keeps it (glibc).

    It keeps a heap for each of many threads, and what a large save has passed through them stays in them, gigabytes on
    a machine of many cores.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def device_limit(config: RunConfig) -> int | None:
    """The most that the allocator of the first device gives, in bytes.

    Where it has no such limit (a CPU), `train.memory_limit` stands for it, or None.
    """
    stats, wanted = jax.local_devices()[0].memory_stats() or {}, config.train.memory_limit
    return stats.get("bytes_limit", None if wanted is None else parse_bytes("train.memory_limit", wanted))


def fits(components: Mapping[str, int], config: RunConfig) -> bool:
    """Whether the device has as much as the components take together; true where its limit is not known."""
    limit = device_limit(config)
    return limit is None or sum(components.values()) <= limit


def check_fits(components: Mapping[str, int], config: RunConfig) -> None:
    """Raise UserError, before the first step, where the components together are more than the device has."""
    if not fits(components, config):
        raise UserError(_report("the run does not fit the device", components, config))


@contextlib.contextmanager
def out_of_memory(phase: str, components: Mapping[str, int], config: RunConfig) -> Iterator[None]:
    """Turn the running out of memory, of the device or the host, into a UserError with the components known so far."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).splitlines() or ["the host has no more"])[0]
        raise UserError(_report(f"out of memory: {phase}: {reason}", components, config)) from error


def first_that_fits(
    policies: Sequence[str],
    traced: Callable[[str], T],
    memory: dict[str, int],
    config: RunConfig,
    progress: Progress,
) -> tuple[T, jax.stages.Compiled]:
    """Compile the step with one policy after another until one fits; its share is added to `memory`.

    traced: the step with a policy, which has `compile`. It is returned with what it was compiled to.

    Raises:
        UserError: none fits.
    """
    for policy in policies:
        with out_of_memory("compiling the step", memory, config):
            step = traced(policy)
            compiled = step.compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        memory[IN_STEP] = analysis.temp_size_in_bytes
        progress.note(f"one step with remat {policy} holds {format_bytes(memory[IN_STEP])} beside weights and state")
        if everywhere(fits(memory, config)):
            break
    check_fits(memory, config)
    return step, compiled


def _report(what: str, components: Mapping[str, int], config: RunConfig) -> str:
    limit = device_limit(config)
    lines = [f"  {name}: {format_bytes(size)}" for name, size in components.items()]
    head = "Known so far" if limit is None else f"Of {format_bytes(limit)} that the device gives"
    train, data = config.train, config.data
    remedies = []
    if train.remat in ("none", "selective"):
        remedies.append(f"set train.remat to full, offload or lean (now {train.remat})")
    elif train.remat in ("full", "offload"):
        remedies.append(f"set train.remat to lean (now {train.remat})")
    elif train.remat == "auto":
        # It has taken what was planned to fit.
        remedies.append("set train.remat to full, offload or lean (now auto)")
    if train.batch_size > config.mesh.data * config.mesh.fsdp:
        remedies.append(
            f"lower train.batch_size (now {train.batch_size}) and raise train.gradient_accumulation_steps for it"
        )
    if train.memory_limit is not None:
        remedies.append(f"raise train.memory_limit (now {train.memory_limit})")
    remedies.append(f"lower data.max_length (now {data.max_length}) or lora.r (now {config.lora.r})")
    if not config.model.load_in_4bit:
        remedies.append("set model.load_in_4bit to true")
    return "\n".join([what, *([f"{head}:", *lines] if lines else []), "To fit: " + "; ".join(remedies)])
