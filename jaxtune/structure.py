"""The arrays of a run as shapes and dtypes alone: what a plan adds up, and what the step is compiled with."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import ModelConfig, RunConfig
from jaxtune.loading import tensors_of
from jaxtune.lora import init_lora
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer
from jaxtune.step import TrainState, init_state
from pallas_kernels import nf4


def frozen_structure(hf_config: Mapping[str, Any], config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The tree that `loading.load_model` gives, with `ShapeDtypeStruct`s for arrays, from the model's config alone.

    Of a bitsandbytes checkpoint, linears in modules that its config says were skipped are dense.

    Raises:
        UserError: the family is not supported, or its config is incomplete.
    """
    quantization = hf_config.get("quantization_config") or {}
    double_quant = quantization.get("bnb_4bit_use_double_quant", config.double_quant)
    slots = tensors_of(hf_config)
    skipped = quantization.get("llm_int8_skip_modules") or ()
    dense = {slot.path for slot in slots if any(module in slot.name for module in skipped)}
    tree: dict[str, Any] = {}
    for slot in slots:
        if slot.layer not in (None, 0):
            continue
        stack = () if slot.layer is None else (hf_config["num_hidden_layers"],)
        leaf: Any = jax.ShapeDtypeStruct((*stack, *slot.shape), dtype)
        if config.load_in_4bit and slot.is_linear and slot.path not in dense:
            leaf = jax.eval_shape(functools.partial(nf4.quantize, double_quant=double_quant), leaf)
        *parents, key = slot.path
        node = functools.reduce(lambda above, name: above.setdefault(name, {}), parents, tree)
        node[key] = leaf
    return tree


def state_structure(config: RunConfig, decoder: DecoderConfig, dtype: Any, total_steps: int = 1000) -> TrainState:
    """The train state before the first update, with `ShapeDtypeStruct`s for arrays."""
    optimizer = make_optimizer(config.train, total_steps)

    def start() -> TrainState:
        return init_state(init_lora(config.lora, decoder), optimizer, config.train.seed, dtype)

    state: TrainState = jax.eval_shape(start)
    return state


def batch_structure(
    config: RunConfig, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """One batch [accumulation, B, T] as `data.loader.Loader` gives it."""
    shape = config.train.gradient_accumulation_steps, config.train.batch_size, config.data.max_length
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"loss_weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, which may be shapes only."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
