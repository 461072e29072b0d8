"""The arrays of a run as shapes and dtypes alone: what a plan adds up, and what the step is compiled with."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.config import ModelConfig, RunConfig, TrainConfig
from jaxtune.errors import UserError
from jaxtune.head import HEAD, check_head, small_head
from jaxtune.linear import Fp8
from jaxtune.loading import tensors_of
from jaxtune.lora import adaptation, init_lora
from jaxtune.mesh import placed_structures
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer
from jaxtune.remat import UNROLLED
from jaxtune.step import (
    StepConfig,
    TrainState,
    batch_sharding,
    init_state,
    jit_train_step,
    make_mesh,
)
from pallas_kernels import nf4


def frozen_structure(hf_config: Mapping[str, Any], config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The tree that `loading.load_model` gives, with `ShapeDtypeStruct`s for arrays, from the model's config alone.

    Of a bitsandbytes checkpoint, linears in modules that its config says were skipped are dense, and others are decoded
    to the dtype that the model was saved in.

    Raises:
        UserError: the family is not supported, or its config is incomplete.
    """
    quantization = hf_config.get("quantization_config") or {}
    double_quant = quantization.get("bnb_4bit_use_double_quant", config.double_quant)
    saved_in = (hf_config.get("dtype") or hf_config.get("torch_dtype")) if quantization else None
    slots = tensors_of(hf_config)
    skipped = quantization.get("llm_int8_skip_modules") or ()
    dense = {slot.path for slot in slots if any(module in slot.name for module in skipped)}
    if config.embedding_on_host:
        slots = [slot for slot in slots if slot.path[0] != "embed_tokens"]
    check_head(config, hf_config, {slot.path for slot in slots})
    tree: dict[str, Any] = {}
    for slot in slots:
        if slot.layer not in (None, 0):
            continue
        stack = () if slot.layer is None else (hf_config["num_hidden_layers"],)
        leaf: Any = jax.ShapeDtypeStruct((*stack, *slot.shape), dtype)
        if slot.path == HEAD:
            leaf = jax.eval_shape(functools.partial(small_head, config=config), leaf)
        elif config.load_in_4bit and slot.is_linear and slot.path not in dense:
            leaf = leaf if saved_in is None else jax.ShapeDtypeStruct(leaf.shape, saved_in)
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
    config: RunConfig, sharding: jax.sharding.Sharding | None = None, *, embedded: tuple[int, Any] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """One batch [accumulation, B, T] as `data.loader.Loader` gives it; with the tokens' `embedded` rows of this width
    and dtype, in host memory, where the table is."""
    shape = config.train.gradient_accumulation_steps, config.train.batch_size, config.data.max_length
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"loss_weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    if config.model.embedding_on_host and embedded is not None:
        width, dtype = embedded
        on_host = None if sharding is None else sharding.with_memory_kind("pinned_host")
        batch["embedded"] = jax.ShapeDtypeStruct((*shape, width), dtype, sharding=on_host)
    return batch


def loaded_structure(
    config: RunConfig, hf_config: Mapping[str, Any], dtype: Any, state: TrainState, mesh: Mesh
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """The frozen weights as a run of one device will have them, and a batch of it, before either is there."""
    frozen, _, _ = placed_structures(frozen_structure(hf_config, config.model, dtype), state, mesh, paged=False)
    return frozen, batch_structure(config, batch_sharding(mesh), embedded=(hf_config["hidden_size"], dtype))


def step_settings(config: RunConfig, decoder: DecoderConfig, dtype: Any, policy: str) -> StepConfig:
    """What the step of a run is compiled with on the device at hand, under a policy of `remat.POLICIES`."""
    train = config.train
    return StepConfig(
        decoder,
        adaptation(config.lora),
        dtype,
        packed=config.data.packing,
        remat=policy,
        unroll=policy in UNROLLED and jax.default_backend() == "gpu",
        max_grad_norm=train.max_grad_norm,
        loss_chunk=train.loss_chunk,
        paged=train.is_paged,
        deterministic=train.deterministic,
        fp8=fp8_linears(train, decoder),
    )


def fp8_linears(train: TrainConfig, decoder: DecoderConfig) -> Fp8 | None:
    """Which linears a run computes in 8 bits, None for none.

    Raises:
        UserError: a layer to leave out that the model does not have.
    """
    if train.compute == "dtype":
        return None
    count = decoder.num_layers
    for layer in train.fp8_exclude_layers:
        if not -count <= layer < count:
            raise UserError(
                f"train.fp8_exclude_layers has {layer}, but the model's {count} layers are 0 to {count - 1} (or "
                f"{-count} to -1 from the end); correct it"
            )
    layers = tuple(sorted({layer % count for layer in train.fp8_exclude_layers}))
    return Fp8(tuple(sorted(train.fp8_exclude)), layers, exact_forward=train.compute == "fp8_backward")


def compile_step(config: RunConfig, hf_config: Mapping[str, Any], dtype: Any, policy: str) -> jax.stages.Compiled:
    """The run's step, compiled for the devices at hand from shapes alone: no weight is read, no memory taken."""
    decoder = DecoderConfig.from_hf(hf_config)
    mesh = make_mesh(**config.mesh.axes)
    settings = step_settings(config, decoder, dtype, policy)
    trees = frozen_structure(hf_config, config.model, dtype), state_structure(config, decoder, dtype)
    frozen, state, parts = placed_structures(*trees, mesh, paged=settings.paged)
    settings = dataclasses.replace(settings, parts=parts)
    # The horizon changes constants only.
    jitted: Any = jit_train_step(make_optimizer(config.train, 1000), settings, mesh)
    batch = batch_structure(config, batch_sharding(mesh), embedded=(decoder.hidden_size, dtype))
    compiled: jax.stages.Compiled = jitted.lower(state, frozen, batch).compile()
    return compiled


def step_bytes(compiled: jax.stages.Compiled) -> int:
    """The most that a compiled step holds of one device, its arguments (weights, state, batch) included."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new_outputs)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, which may be shapes only."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
