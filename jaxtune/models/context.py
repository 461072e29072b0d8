"""What all layers of one kind share in one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from jax import Array
from jaxtyping import Int

from jaxtune.linear import Adaptation, Fp8
from jaxtune.parts import Parts


@dataclasses.dataclass(frozen=True)
class Context:
    """Angles, documents and settings of one forward pass.

    cos, sin: float32 [B, T, H / 2], or narrower where only the front of each head is turned.
    segment_ids: int32 [B, T], or None where every row is one document.
    cache_start: tokens already in the KV cache, int32 scalar; 0 in training.
    adaptation: how adapters act.
    cache_first: index of each row's first token in the KV cache, int32 [B], where rows are padded in front; else None.
    window: keys that a query sees, or None for all.
    mlp_chunk: tokens that pass through an MLP at a time, recomputed in the backward pass; None for all at once.
    mlp_slices: as of `Execution`.
    parts: how the model is cut over the devices of a mesh; None on one device.
    fp8: which linears are computed in 8 bits; None for none.
    deterministic: as of `Execution`.
    again: layers are computed again in the backward pass, from their inputs alone.
    """

    cos: Array
    sin: Array
    segment_ids: Array | None
    cache_start: Array | int
    adaptation: Adaptation
    cache_first: Array | None = None
    window: int | None = None
    mlp_chunk: int | None = None
    parts: Parts | None = None
    fp8: Fp8 | None = None
    deterministic: bool = False
    again: bool = False
    mlp_slices: int = 1


Cache: TypeAlias = dict[str, Array]
Wrap: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How all layers are run: what it takes of time and memory, and with fp8 of exactness.

    remat: wraps a layer so that its activations are recomputed in the backward pass (see jaxtune.remat).
    unroll: one program for all layers instead of a loop over one layer's: faster where nothing is recomputed, and
        slower to compile.
    mlp_chunk: tokens that pass through an MLP at a time; None for all.
    mlp_slices: of an MLP's width, one after the other for all tokens, at most, where MLPs can be cut so.
    parts: inside of a `shard_map`, how the trees are cut over its devices; arguments and results are this device's.
    fp8: which linears are computed in 8 bits; None for none.
    deterministic: without kernels whose sums have no fixed order.
    keeps: where the layers' inputs are kept, "device" or "host", if nothing else is (see from_inputs.py); in place of
        `remat`.
    """

    remat: Wrap | None = None
    unroll: bool = False
    mlp_chunk: int | None = None
    parts: Parts | None = None
    fp8: Fp8 | None = None
    deterministic: bool = False
    keeps: str | None = None
    mlp_slices: int = 1


PLAIN = Execution()


@dataclasses.dataclass(frozen=True)
class Past:
    """What came before the tokens at hand, in generation.

    cache: {"k", "v"}: [L, B, S, K, H]; new keys and values are written from index `start` on. first: index of each
    row's first token in the cache, where rows are padded in front; None where they are not.
    """

    cache: Cache
    start: Array | int = 0
    first: Int[Array, " B"] | None = None
