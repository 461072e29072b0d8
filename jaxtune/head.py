"""The output head in fewer bits (`model.head`): how it is made, and which models have a head of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax import Array

from jaxtune.config import ModelConfig
from jaxtune.errors import UserError
from pallas_kernels import nf4
from pallas_kernels.cross_entropy import Head, Int8Head, decoded_head, quantize_head
from pallas_kernels.nf4 import NF4Tensor

# Where a head of its own is in the tree.
HEAD = ("lm_head", "kernel")
_BLOCK_SIZE = 64


def small_head(head: Array, config: ModelConfig) -> Head:
    """A head as `model.head` has it, from one in the compute dtype."""
    if config.head == "nf4":
        return nf4.quantize(head, double_quant=config.double_quant)
    return _in_8_bits(head) if config.head == "int8" else head


def held_like(tensor: Array, before: Any) -> Head:
    """A tensor in the form of the one whose place it takes: perhaps in fewer bits (a head) or in host memory."""
    if isinstance(before, NF4Tensor):
        return nf4.quantize(tensor, double_quant=before.nested_absmax is not None)
    return _in_8_bits(tensor) if isinstance(before, Int8Head) else jax.device_put(tensor, before.sharding)


def without_int8(frozen: Mapping[str, Any], dtype: Any) -> Mapping[str, Any]:
    """Frozen parameters whose head is no more in 8 bits, a form of our own, but as `dtype` decodes it."""
    if not isinstance(head := frozen.get(HEAD[0], {}).get(HEAD[1]), Int8Head):
        return frozen
    return {**frozen, HEAD[0]: {HEAD[1]: decoded_head(head, dtype)}}


def check_head(config: ModelConfig, hf_config: Mapping[str, Any], paths: Collection[tuple[str, ...]]) -> None:
    """Raise UserError where `model.head` or `model.embedding_on_host` asks for what a model with tensors at these paths
    does not have: a head that is not its embedding table."""
    if config.embedding_on_host and HEAD not in paths:
        raise UserError(
            "model.embedding_on_host is true, but this model's head is its embedding table, which the device needs "
            "whole; set it to false"
        )
    if config.head == "dtype":
        return
    if HEAD not in paths:
        raise UserError(
            f"model.head is {config.head}, but this model's head is its embedding table, which is held in the compute "
            "dtype; set it to dtype"
        )
    if config.head == "nf4" and (width := hf_config["hidden_size"]) % _BLOCK_SIZE:
        raise UserError(
            f"model.head is nf4, but the head's rows of {width} weights are not whole blocks of {_BLOCK_SIZE}; set it "
            "to int8 or dtype"
        )


_in_8_bits = jax.jit(quantize_head)
