"""A run of several processes: how they join, agree and end. For a run of one process every function here is trivial.

All but `several` and `is_first` have to be called by every process, in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.errors import Interrupted, UserError
from jaxtune.launch import Launch
from jaxtune.watch import Watch

log = logging.getLogger(__name__)

# What JAX itself gives a process that is silent; `Watch` is quicker, and says more.
_HEARTBEAT_SECONDS = 100
_START_SECONDS = 300
# An exception, or what caused it, may come from another process's end; the watch then tells of it within this time.
_TOLD_SECONDS = 5.0


def several() -> bool:
    """Whether the run has more than one process. Starts no device where it has not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes the run's files."""
    return not several() or jax.process_index() == 0


@contextlib.contextmanager
def joined(launch: Launch | None, note: Callable[[str], None]) -> Iterator[None]:
    """The context in which this process is one of the run's; to be entered before JAX starts its devices.

    note: is told who joins, and when all have.

    Raises:
        UserError: the processes do not find each other.
    """
    if launch is None:
        yield
        return
    note(f"{launch.describe()}; waiting for the others, {_START_SECONDS} s at most")
    _initialize(launch)
    watch = Watch(launch.process, launch.processes)
    try:
        _start(watch, launch)
        note(f"all {launch.processes} processes are here, with {jax.device_count()} devices")
        yield
        # Whoever is ready waits, so that one that fails at its last file is noticed.
        together()
    except Interrupted:
        together()
        watch.close()
        raise
    except BaseException as error:
        own = isinstance(error, UserError | NotImplementedError | OSError) and error.__cause__ is None
        if isinstance(error, Exception) and not own:
            time.sleep(_TOLD_SECONDS)
        watch.fail((str(error).splitlines() or [type(error).__name__])[0])
        raise
    watch.close()
    jax.distributed.shutdown()


def _initialize(launch: Launch) -> None:
    visible = jax.config.values["jax_cuda_visible_devices"]
    # It would take SIGTERM, and do nothing that this run knows of.
    jax.config.update("jax_enable_preemption_service", False)
    detected = launch.launcher is not None and launch.coordinator is None
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            None if launch.device is None else [launch.device],
            cluster_detection_method=launch.launcher if detected else "deactivate",
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = f"at {launch.coordinator}" if launch.coordinator else "by the launcher's variables"
        raise UserError(
            f"the {launch.processes} processes did not find each other {where}: {str(error).splitlines()[0]}; see that "
            "all of them are started and reach that port, or name another with --coordinator HOST:PORT"
        ) from error
    if launch.device is None:
        # JAX would take the one device of this process's number where it knows the launcher.
        jax.config.update("jax_cuda_visible_devices", visible)


def _start(watch: Watch, launch: Launch) -> None:
    host = launch.coordinator.rpartition(":")[0].strip("[]") if launch.coordinator else socket.gethostname()
    port, word = watch.serve() if launch.process == 0 else (0, "")
    host, port, word = agreed([host, port, word])
    if launch.process > 0:
        try:
            watch.connect(host, port, word)
        except OSError as error:
            log.warning(
                "process 0 is not reached at %s, port %d (%s): should a process die, it shows only after %d s",
                *(host, port, error, _HEARTBEAT_SECONDS),
            )


def agreed(value: Any) -> Any:
    """What process 0 gives, to all: any JSON."""
    if not several():
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(data))))
    return json.loads(bytes(broadcast_one_to_all(data if is_first() else np.zeros(size, np.uint8))))


def largest(value: int) -> int:
    """The largest of what the processes give."""
    if not several():
        return value
    own, function = _largest()
    given = jax.make_array_from_callback((jax.device_count(),), own, lambda index: np.full(1, value, np.int32))
    return int(function(given))


@functools.cache
def _largest() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), "every")
    return NamedSharding(mesh, P("every")), jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def largest_each(values: np.ndarray) -> np.ndarray:
    """Element by element the largest of what the processes give, NaN where one of them has it."""
    return np.max(process_allgather(values), axis=0) if several() else values


def everywhere(true: bool) -> bool:
    """Whether it is so in all processes."""
    return largest(int(not true)) == 0


def together() -> None:
    """Go on once all processes have come here."""
    largest(0)


def check_same(**values: str) -> None:
    """Raise UserError where a process has another value than process 0; names say what it is, with `_` for blanks."""
    others = [name.replace("_", " ") for name, value in agreed(values).items() if values[name] != value]
    if others:
        raise UserError(
            f"process {jax.process_index()} ({socket.gethostname()}) has another {' and '.join(others)} than process "
            "0; start all processes with the same configuration and files"
        )


def whole(tree: Any) -> Any:
    """Arrays that are spread over the processes, put together on each; others as they are."""
    if not several():
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        gather: Any = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))  # type: ignore[attr-defined]
        gathered: jax.Array = gather(leaf).addressable_data(0)
        return gathered

    return jax.tree.map(one, tree)


def own_copy(tree: Any) -> Any:
    """Of arrays that every device holds, this process's, to compute with alone. May be called by one process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree) if several() else tree
