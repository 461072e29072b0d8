"""The one jitted train step, and the evaluation step beside it, written against a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.linear import Adaptation, Fp8
from jaxtune.loss_scale import LossScale
from jaxtune.models.config import DecoderConfig
from jaxtune.models.context import Execution, Wrap
from jaxtune.models.decoder import Tree, head_weight, hidden_states
from jaxtune.optim import updated
from jaxtune.parts import AXES, Parts
from jaxtune.remat import MLP_CHUNK, NARROW_GRADIENTS, OFFLOADED, kept_inputs, remat_wrapper
from pallas_kernels.cross_entropy import linear_cross_entropy

Batch = Mapping[str, Array]
_BATCH = P(None, ("data", "fsdp"), "sequence")


@flax.struct.dataclass
class TrainState:
    """What training changes, and what a checkpoint holds beside the data position.

    step: int32, updates done. lora: the adapter tree. opt_state: optax's. rng: uint32 key data that every step's
    dropout key is derived from. loss_scale: of float16, else None.
    """

    step: Array
    lora: Any
    opt_state: Any
    rng: Array
    loss_scale: LossScale | None


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What is fixed when the step is compiled.

    dtype: compute dtype. adaptation: how adapters act. packed: rows hold several documents (batches carry segment_ids).
    remat: policy of jaxtune.remat. unroll: layers unrolled instead of scanned. max_grad_norm: clipping, or None.
    loss_chunk: tokens of logits at a time, or None. paged: the optimizer's state is in host memory between
    updates. deterministic: without kernels whose sums have no fixed order. parts: how arrays are cut over several
    devices (`mesh.make_parts`), or None on one. fp8: which linears are computed in 8 bits, in training; None for none.
    """

    decoder: DecoderConfig
    adaptation: Adaptation
    dtype: Any
    packed: bool = True
    remat: str = "full"
    unroll: bool = False
    max_grad_norm: float | None = None
    loss_chunk: int | None = None
    paged: bool = False
    deterministic: bool = False
    parts: Parts | None = None
    fp8: Fp8 | None = None


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh of the first data * fsdp * tensor * sequence devices; neighbours along tensor are next to each other."""
    shape = data, fsdp, sequence, tensor
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=jax.devices()[: math.prod(shape)])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, *, paged: bool) -> Any:
    """A `TrainState` of where its parts are between steps: on every device, and with `paged` the optimizer's state in
    pinned host memory."""
    whole: Any = replicated(mesh)
    return TrainState(whole, whole, whole.with_memory_kind("pinned_host") if paged else whole, whole, whole)


def batch_spec() -> P:
    """How [accumulation, rows, T] is cut over the mesh's axes."""
    return _BATCH


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of [accumulation, rows, T] spread over the data and fsdp axes, their tokens over the sequence axis."""
    return NamedSharding(mesh, _BATCH)


def init_state(lora: Any, optimizer: optax.GradientTransformation, seed: int, dtype: Any) -> TrainState:
    """The state before the first update."""
    rng = jax.random.key_data(jax.random.key(seed))
    scale = LossScale.start() if dtype == jnp.float16 else None
    return TrainState(jnp.int32(0), lora, optimizer.init(lora), rng, scale)


def batch_loss(
    lora: Tree,
    frozen: Tree,
    batch: Batch,
    config: StepConfig,
    dropout_key: Array | None,
    *,
    wrap: Wrap | None = None,
    trained: Tree | None = None,
) -> Array:
    """Sum over the batch's learnt tokens of their negative log likelihood, float32.

    batch: tokens, targets, positions, segment_ids (int32 [B, T]) and loss_weights (float32 [B, T]); and embedded
    [B, T, D], the tokens' rows of the embedding table, where `frozen` has none. wrap: put around each layer instead of
    what the policy has there. trained: see `hidden_states`.
    """
    memory_kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    keeps = kept_inputs(config.remat, memory_kinds)
    decoder, vocabulary = config.decoder, None
    if config.parts is not None:
        decoder, vocabulary = config.parts.decoder(decoder), config.parts.vocabulary
        frozen = config.parts.local(frozen)
    execution = Execution(
        remat=remat_wrapper(config.remat, unrolled=config.unroll) if wrap is None else wrap,
        unroll=config.unroll,
        mlp_chunk=MLP_CHUNK.get(config.remat),
        parts=config.parts,
        fp8=config.fp8,
        deterministic=config.deterministic,
        keeps=keeps if wrap is None else None,
    )
    hidden, _ = hidden_states(
        frozen,
        lora,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"] if config.packed else None,
        decoder,
        config.adaptation,
        dtype=config.dtype,
        execution=execution,
        dropout_key=dropout_key,
        embedded=batch.get("embedded"),
        trained=trained,
    )
    return linear_cross_entropy(
        hidden,
        head_weight(frozen),
        batch["targets"],
        batch["loss_weights"],
        cap=config.decoder.logit_cap,
        chunk=config.loss_chunk,
        vocabulary=vocabulary,
    )


def micro_batch(batch: Batch, index: Array | int) -> Batch:
    """One of the micro-batches [accumulation, B, T], rows of embeddings fetched where they are in host memory."""
    micro = {name: lax.dynamic_index_in_dim(values, index, keepdims=False) for name, values in batch.items()}
    if "embedded" in micro:
        micro["embedded"] = jax.device_put(micro["embedded"], jax.memory.Space.Device)
    return micro


def accumulate(
    lora: Tree, frozen: Tree, batch: Batch, config: StepConfig, key: Array | None, scale: Array | float
) -> tuple[Array, Any]:
    """Loss and gradient of the mean over all learnt tokens of all micro-batches.

    Sums are accumulated over micro-batches and divided once by the number of learnt tokens of the whole batch, so that
    a token weighs the same whichever micro-batch it falls in.

    Args:
        batch: arrays [accumulation, B, T].
        key: dropout's key of this step, or None.
        scale: the loss is multiplied by it before differentiation and the gradient divided after.

    Returns:
        The loss, float32, and the gradient tree in float32; in bfloat16 where the policy says so (`NARROW_GRADIENTS`)
        and there is one micro-batch.
    """
    learnt = jnp.sum(batch["loss_weights"])
    # On one device the number of tokens is known before, so that a gradient is rounded once.
    narrow = config.remat in NARROW_GRADIENTS and config.parts is None and config.dtype != jnp.float16
    factor = scale / jnp.maximum(learnt, 1e-8) if narrow else scale

    def one(index: Array) -> tuple[Array, Any]:
        micro = micro_batch(batch, index)
        micro_key = None if key is None else jax.random.fold_in(key, index)

        def loss(trained: Tree) -> Array:
            if not narrow:
                return factor * batch_loss(trained, frozen, micro, config, micro_key)
            return factor * batch_loss(lora, frozen, micro, config, micro_key, trained=trained)

        narrowed = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), lora)
        return jax.value_and_grad(loss)(narrowed if narrow else lora)

    count = batch["tokens"].shape[0]
    if count == 1:
        total, gradient = one(jnp.int32(0))
        gradient = gradient if narrow else _float32(gradient)
    else:
        zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), lora))

        def add(sums: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], None]:
            return jax.tree.map(jnp.add, sums, _float32(one(index))), None

        (total, gradient), _ = lax.scan(add, zeros, jnp.arange(count))
    if narrow:
        return total, gradient
    if config.parts is not None:
        (total, learnt), gradient = config.parts.summed((total, learnt), gradient)
    weight = jnp.maximum(learnt, 1e-8) * scale
    return total / weight, jax.tree.map(lambda g: g / weight, gradient)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def train_step(
    state: TrainState, frozen: Tree, batch: Batch, optimizer: optax.GradientTransformation, config: StepConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state and float32 scalars: loss, grad_norm (before clipping), and for float16
    loss_scale.

    Where loss or gradient is not finite, adapter and optimizer stay as they were; where float16 gradients overflow, the
    loss scale is halved.
    """
    key = None
    if config.adaptation.dropout_rate > 0:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
    loss, gradient = accumulate(state.lora, frozen, batch, config, key, scale)
    norm = optax.tree.norm(_float32(gradient)) if config.parts is None else config.parts.norm(gradient)
    metrics = {"loss": loss, "grad_norm": norm}
    opt_state = state.opt_state
    if config.paged:
        # Tied to the norm: nothing needs the state before the gradients are there.
        opt_state, norm = lax.optimization_barrier((opt_state, norm))
        opt_state = jax.device_put(opt_state, jax.memory.Space.Device)

    def update(gradient: Any, opt_state: Any, lora: Any) -> tuple[Any, Any]:
        if config.max_grad_norm is not None:
            clip = jnp.minimum(1.0, config.max_grad_norm / (norm + 1e-6))
            gradient = jax.tree.map(lambda g: g * clip, gradient)
        return updated(optimizer, gradient, opt_state, lora)

    # A branch, not a choice element by element: the state is overwritten where it stands.
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    lora, opt_state = lax.cond(
        finite, update, lambda _, opt_state, lora: (lora, opt_state), gradient, opt_state, state.lora
    )
    if state.loss_scale is not None:
        metrics["loss_scale"] = state.loss_scale.scale
        # A loss that overflows does so at any scale.
        scales = state.loss_scale.after(finite), state.loss_scale
        state = dataclasses.replace(state, loss_scale=jax.tree.map(partial(jnp.where, jnp.isfinite(loss)), *scales))
    return dataclasses.replace(state, step=state.step + 1, lora=lora, opt_state=opt_state), metrics


def eval_step(lora: Tree, frozen: Tree, batch: Batch, config: StepConfig) -> tuple[Array, Array]:
    """Summed loss and number of learnt tokens of one batch [1, B, T], without dropout."""
    rows = micro_batch(batch, 0)
    sums = batch_loss(lora, frozen, rows, config, None), jnp.sum(rows["loss_weights"])
    return sums if config.parts is None else config.parts.sums(sums)


def jit_train_step(
    optimizer: optax.GradientTransformation, config: StepConfig, mesh: Mesh | AbstractMesh
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, Array]]]:
    """`train_step` compiled for the mesh (or, for an abstract one, to be traced); the state's buffers are donated."""
    step: Any = partial(train_step, optimizer=optimizer, config=config)
    assert (mesh.size == 1) == (config.parts is None), (mesh, config.parts)
    out: Any = None
    if isinstance(mesh, Mesh) and config.parts is None:
        out = state_sharding(mesh, paged=config.paged), replicated(mesh)
    if (parts := config.parts) is not None:
        specs = (parts.state, parts.frozen, _BATCH), (parts.state, P())
        step = jax.shard_map(step, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    options = None if isinstance(mesh, AbstractMesh) else _compiler_options(config, mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


def _compiler_options(config: StepConfig, platform: str) -> dict[str, bool] | None:
    """XLA's options for the train step; those for speed have their measured pairs in benchmarks/NOTES.md."""
    if platform != "gpu":
        return None
    # cuBLAS adds the adapter's product to the base's while it writes; XLA's own Triton matmuls do not.
    options = {"xla_gpu_enable_triton_gemm": False}
    if config.deterministic:
        # Of XLA's own kernels and algorithms; attention's are chosen in `pallas_kernels`.
        options["xla_gpu_exclude_nondeterministic_ops"] = True
    if config.remat in OFFLOADED:
        # Without it the copies of layer inputs to and from the host do not overlap with compute.
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    return options


def jit_eval_step(config: StepConfig, mesh: Mesh) -> Callable[[Tree, Tree, Batch], tuple[Array, Array]]:
    """`eval_step` compiled for the mesh; never in 8 bits: what is measured is the adapter as it will be used."""
    step: Any = partial(eval_step, config=dataclasses.replace(config, remat="none", fp8=None))
    if (parts := config.parts) is not None:
        specs = (parts.state.lora, parts.frozen, _BATCH)
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(step, out_shardings=replicated(mesh))
