"""What generation takes of a device, and how fast it can be at most: from the arrays' shapes, for any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.decoding import CACHE_MULTIPLE, CHUNK, SLICES, empty_cache, padded_length
from jaxtune.devices import Device
from jaxtune.lora import init_lora
from jaxtune.models.config import DecoderConfig
from jaxtune.structure import frozen_structure, tree_bytes


@dataclasses.dataclass(frozen=True)
class Generation:
    """Bytes on the device: weights with the adapter, cache of keys and values, and what a chunk of the prompt needs
    beside them; and those of the weights that every token reads."""

    weights: int
    cache: int
    chunk: int
    read: int

    @property
    def peak(self) -> int:
        """In the fullest moment, which is the prompt's."""
        return self.weights + self.cache + self.chunk

    def most_tokens_per_second(self, device: Device, batch: int = 1) -> float:
        """Where nothing but reading the weights took time."""
        return batch * device.bandwidth / self.read


def plan_generation(
    hf_config: Mapping[str, Any],
    config: ModelConfig,
    lora: LoraConfig,
    dtype: Any,
    *,
    prompt: int,
    new: int,
    sliced: bool = True,
) -> Generation:
    """Of one row: a prompt and new tokens, with a model and adapter of these shapes. sliced: whether MLPs are computed
    in slices, as through Triton.

    A chunk's share is what XLA holds on an H200 for Llama shapes with an adapter: the widest linears decoded, which are
    q, k and v or (a slice of) gate and up, and what layers give.
    """
    decoder, size = DecoderConfig.from_hf(hf_config), np.dtype(dtype).itemsize
    frozen = frozen_structure(hf_config, config, dtype)
    adapter = tree_bytes(jax.eval_shape(lambda: init_lora(lora, decoder))) // 4 * size
    tokens = padded_length(prompt)
    room = -(-(tokens + new) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    cache = tree_bytes(jax.eval_shape(lambda: empty_cache(decoder, 1, room, dtype)))
    rows = {name: shape[0] for name, shape in decoder.linear_shapes().items()}
    widest, inner = max(rows["q_proj"] + 2 * rows["k_proj"], 2 * rows["gate_proj"] // SLICES), 6 * decoder.hidden_size
    if not sliced:
        widest, inner = 2 * rows["gate_proj"], 3 * rows["gate_proj"]
    chunk = (widest * decoder.hidden_size + inner * min(tokens, CHUNK)) * size
    weights = tree_bytes(frozen) + adapter
    idle = tree_bytes(frozen["embed_tokens"]) if "lm_head" in frozen and "embed_tokens" in frozen else 0
    return Generation(weights, cache, chunk, weights - idle)
