"""What the backward pass recomputes: named policies over a layer of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxtune.errors import UserError

Layer = Callable[..., Any]


def remat_wrapper(policy: str, memory_kinds: set[str]) -> Callable[[Layer], Layer] | None:
    """The function that `hidden_states` wraps each layer with.

    Args:
        policy: "none" keeps every activation that the backward pass needs. "full" keeps each layer's input and
        recomputes the
            rest. "offload" is full with the layer inputs in pinned host memory.
        memory_kinds: what the device offers (`{m.kind for m in device.addressable_memories()}`).

    Raises:
        UserError: offload on a device that has no pinned host memory.
    """
    if policy == "none":
        return None
    if policy == "full":
        # Recomputation inside a scan needs no barrier against common-subexpression elimination.
        return lambda layer: jax.checkpoint(layer, prevent_cse=False)
    assert policy == "offload", policy
    if "pinned_host" not in memory_kinds:
        raise UserError(
            "train.remat: offload needs pinned host memory, which this device does not offer; use remat: full"
        )
    keep_on_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return lambda layer: jax.checkpoint(layer, prevent_cse=False, policy=keep_on_host)
