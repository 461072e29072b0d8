"""What the backward pass recomputes: named policies over a layer of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxtune.errors import UserError

Layer = Callable[..., Any]

# From fast to lean.
POLICIES = ("none", "selective", "full", "offload", "lean")
# Those whose layers are unrolled on a GPU: a loop copies what it keeps for the backward pass in and out, which is 2 ms
# a layer of an 8B model with "none".
UNROLLED = ("none", "selective")
# Those that compute a layer again from its input.
FROM_INPUTS = ("full", "offload", "lean")
# Those that keep the layers' inputs in host memory.
OFFLOADED = ("offload", "lean")
# Tokens that pass through an MLP at a time: its inner activations are the largest arrays of a layer's backward pass.
MLP_CHUNK = {"lean": 1024}
# Those that round each layer's gradients to 16 bits as soon as they are there.
NARROW_GRADIENTS = ("lean",)
# What "selective" keeps beside a layer's input: the products of attention's side, and attention itself. The products of
# gate and up, more than half of what "none" keeps, cost no more per byte than others to make again.
_SELECTED = frozenset(
    ("qkv", "qkv_low_rank", "attention", "attention_sums", "gate_up_input", "gate_up_low_rank", "down_proj_low_rank")
)
_CUDNN_FORWARD = "dot_product_attention_fwd"


def remat_wrapper(policy: str, *, unrolled: bool = False) -> Callable[[Layer], Layer] | None:
    """The function that `hidden_states` wraps each layer with.

    Args:
        policy: "none" keeps what the backward pass needs but what the fused blocks make again in passing: norms and
            gated units. "selective" also makes the products of gate and up again, and rotates queries and keys again.
            The others have their own loop, see `kept_inputs`.
        unrolled: layers are not in a loop.
    """
    if policy != "selective":
        return None
    # A loop is a barrier of its own against the elimination of what is computed twice.
    return lambda layer: jax.checkpoint(layer, prevent_cse=unrolled, policy=_is_selected)


def kept_inputs(policy: str, memory_kinds: set[str]) -> str | None:
    """Where the layers' inputs are kept, "device" or "host", under a policy that keeps nothing else; None for others.

    "full" computes each layer again from its input. "offload" is full with the inputs in pinned host memory, and "lean"
    is offload with MLPs in pieces (`MLP_CHUNK`) and narrow gradients (`NARROW_GRADIENTS`).

    Args:
        memory_kinds: what the device offers (`{m.kind for m in device.addressable_memories()}`).

    Raises:
        UserError: offload or lean on a device that has no pinned host memory.
    """
    if policy not in FROM_INPUTS:
        return None
    if policy not in OFFLOADED:
        return "device"
    if "pinned_host" not in memory_kinds:
        raise UserError(
            f"train.remat: {policy} needs pinned host memory, which this device does not offer; use remat: full"
        )
    return "host"


def _is_selected(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return parameters.get("name") in _SELECTED or primitive.name.startswith(_CUDNN_FORWARD)
