"""Adapters as a tree of their own beside the frozen weights."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxtune.config import LINEARS, LoraConfig
from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig

GROUP_OF_LINEAR = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LINEARS}
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def adaptation(config: LoraConfig) -> Adaptation:
    """How the adapters of this configuration act."""
    denominator = math.sqrt(config.r) if config.use_rslora else config.r
    return Adaptation(scaling=config.lora_alpha / denominator, dropout_rate=config.lora_dropout)


def init_lora(config: LoraConfig, decoder: DecoderConfig) -> dict[str, Any]:
    """A new adapter: A uniform within 1 / sqrt(in) as PEFT draws it (kaiming with a = sqrt(5)), B zero.

    Returns:
        {"layers": {"self_attn": {"q_proj": {"lora_A": [L, R, in], "lora_B": [L, out, R]}, ...}, "mlp": {...}}}, the
        targeted linears only, in config.dtype.
    """
    dtype = DTYPES[config.dtype]
    key = jax.random.key(config.seed)
    layers: dict[str, dict[str, dict[str, Array]]] = {}
    for index, (name, (n, k)) in enumerate(decoder.linear_shapes().items()):
        if name not in config.target_modules:
            continue
        bound = 1.0 / math.sqrt(k)
        shape_a = (decoder.num_layers, config.r, k)
        lora_a = jax.random.uniform(jax.random.fold_in(key, index), shape_a, jnp.float32, -bound, bound).astype(dtype)
        lora_b = jnp.zeros((decoder.num_layers, n, config.r), dtype)
        layers.setdefault(GROUP_OF_LINEAR[name], {})[name] = {"lora_A": lora_a, "lora_B": lora_b}
    return {"layers": layers}


def count_parameters(tree: Any) -> int:
    """Number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
