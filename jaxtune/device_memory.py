"""How much of a GPU this process takes: set before JAX starts the GPU, through its client's options."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Any

import jax

from jaxtune.config_checks import parse_bytes
from jaxtune.devices import CONTEXT_BYTES
from jaxtune.environment import nvidia_smi
from jaxtune.errors import UserError
from jaxtune.metrics import format_bytes

log = logging.getLogger(__name__)

# Without a limit. JAX's own default is 0.75, which would leave a quarter of the card unused.
_WHOLE_CARD = 0.95
_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def limit_memory(limit: str | None) -> None:
    """Take memory as it is needed, and no more than `limit` (as `train.memory_limit`) in all.

    JAX's allocator gets the limit less an allowance of CONTEXT_BYTES for CUDA itself. What the user has set in the
    environment (XLA_PYTHON_CLIENT_PREALLOCATE, XLA_CLIENT_MEM_FRACTION) holds where there is no limit. On a machine
    without an NVIDIA GPU there is nothing to set: a limit is then what a plan is checked against.

    Raises:
        UserError: the limit is more than the GPU has or too little to start with, or contradicts the environment.
    """
    given: Any = jax.config.values["jax_pjrt_client_create_options"] or {}
    options: dict[str, Any] = dict(
        (part.split(":", 1) for part in given.split(";") if part) if isinstance(given, str) else given
    )
    if "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ:
        options.setdefault("preallocate", False)
    set_by_user = [name for name in _VARIABLES if os.environ.get(name)]
    total = _card_bytes() if limit is not None else None
    if limit is not None and total is not None:
        if set_by_user:
            raise UserError(f"train.memory_limit is {limit}, and {set_by_user[0]} is set as well; remove one of them")
        wanted = parse_bytes("train.memory_limit", limit)
        if not 2 * CONTEXT_BYTES <= wanted <= total:
            raise UserError(
                f"train.memory_limit is {limit}; this GPU has {format_bytes(total)}, and a run needs at least "
                f"{format_bytes(2 * CONTEXT_BYTES)}"
            )
        options["memory_fraction"] = (wanted - CONTEXT_BYTES) / total
    elif not set_by_user:
        options.setdefault("memory_fraction", _WHOLE_CARD)
    jax.config.update("jax_pjrt_client_create_options", options)


def start_devices(limit: str | None) -> None:
    """`limit_memory`, and start the devices in a thread: a GPU takes seconds, in which the caller can do other things.

    Where they do not start, that shows where they are first used.
    """
    limit_memory(limit)

    def start() -> None:
        with contextlib.suppress(Exception):
            jax.devices()

    threading.Thread(target=start, name="jaxtune-devices", daemon=True).start()


def check_limit(limit: str | None) -> None:
    """Raise UserError where a limit does not hold since the GPU was started before it was set. Starts the device.

    A device whose allocator has no limit to set, such as a CPU, gives a warning.
    """
    device = jax.local_devices()[0]
    given = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None and given is None:
        log.warning(
            "train.memory_limit is %s, but what a %s gives cannot be limited: a training run is refused where its plan "
            "or its compiled step needs more, and nothing else is held to it",
            *(limit, device.platform),
        )
    elif limit is not None and given is not None and given > parse_bytes("train.memory_limit", limit):
        raise UserError(
            f"train.memory_limit is {limit}, but JAX has started the GPU with {format_bytes(given)} already; call "
            "jaxtune before any other use of JAX in the process"
        )


def _card_bytes() -> int | None:
    """Memory of the first GPU that this process would use, as its driver's tool tells; None where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    text = nvidia_smi("memory.total", first)
    return int(text) * 2**20 if text is not None and text.isdigit() else None
