"""What is checked and said before the weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxtune.config import MeshConfig, RunConfig, TrainConfig
from jaxtune.data.dataset import Dataset
from jaxtune.data.loader import Loader
from jaxtune.devices import Device, this_device
from jaxtune.errors import UserError
from jaxtune.metrics import Progress
from jaxtune.models.config import DecoderConfig
from jaxtune.processes import several
from jaxtune.structure import fp8_linears
from pallas_kernels._device import assume_capability
from pallas_kernels._dispatch import record_choices
from pallas_kernels.attention import attention


def check_devices(mesh: MeshConfig) -> None:
    """Raise UserError where the mesh asks for more devices than there are, or leaves some of several processes out."""
    if mesh.auto:
        return
    if several() and mesh.devices != len(jax.devices()):
        raise UserError(
            f"mesh has {mesh.devices} devices, the {jax.process_count()} processes have {len(jax.devices())}, of which "
            "each takes part; set mesh so that its product is that"
        )
    if mesh.devices > len(jax.devices()):
        axes = " or ".join(f"mesh.{axis}" for axis, size in mesh.axes.items() if size > 1)
        raise UserError(f"mesh asks for {mesh.devices} devices, this machine has {len(jax.devices())}; lower {axes}")


def check_vocabulary(datasets: Sequence[Dataset], prompts: Mapping[str, list[int]], decoder: DecoderConfig) -> None:
    """Raise UserError for a token that the model's embedding does not have."""
    largest = max([data.max_token for data in datasets] + [max(ids) for ids in prompts.values()])
    if largest >= decoder.vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {decoder.vocab_size} entries; "
            "use the tokenizer that belongs to the model"
        )


def check_compute(settings: TrainConfig, device: Device) -> str | None:
    """What to say of a run whose products are in 8 bits on a CPU; UserError on a GPU that has none."""
    if settings.compute == "dtype" or device.has_fp8:
        return None
    if device.capability is None:
        return (
            f"train.compute {settings.compute} on a CPU: the numbers of a GPU's 8-bit products, and none of their speed"
        )
    raise UserError(
        f"train.compute is {settings.compute}, but {device.kind} has compute capability {device.capability}, and "
        "products in 8 bits came with 8.9 (Ada) and 9.0 (Hopper); set train.compute to dtype"
    )


def in_any_order(config: RunConfig, decoder: DecoderConfig, device: Device) -> str | None:
    """What to say of a run whose attention is cuDNN's, and so adds up gradients as they come."""
    if config.train.deterministic or config.data.packing or device.capability is None:
        return None
    q, k = (
        jax.ShapeDtypeStruct((1, 64, n, decoder.head_dim), jnp.bfloat16)
        for n in (decoder.num_heads, decoder.num_kv_heads)
    )
    with assume_capability(device.capability), record_choices(trace_as="xla") as choices:
        jax.eval_shape(lambda q, k: attention(q, k, k, cap=decoder.attention_cap), q, k)
    if choices[0].implementation != "cudnn":
        return None
    return (
        "attention of whole rows may add up gradients in another order each time: another run may differ in rounding "
        "(train.deterministic: true repeats to the bit)"
    )


def check_model(
    config: RunConfig,
    decoder: DecoderConfig,
    datasets: Sequence[Dataset],
    prompts: Mapping[str, list[int]],
    progress: Progress,
) -> None:
    """Raise UserError for what this model, data or device cannot do, and say what else the user should know."""
    check_vocabulary(datasets, prompts, decoder)
    fp8_linears(config.train, decoder)
    for said in (check_compute(config.train, this_device()), in_any_order(config, decoder, this_device())):
        if said is not None:
            progress.note(said)
    if config.data.max_length > decoder.max_position:
        progress.note(
            f"data.max_length {config.data.max_length} is beyond the model's {decoder.max_position} positions"
        )


def count_steps(settings: TrainConfig, loader: Loader) -> int:
    """The run's updates; UserError where warmup would take them all."""
    total = settings.max_steps or loader.steps(settings.num_train_epochs)
    if settings.warmup_steps >= total:
        raise UserError(
            f"train.warmup_steps is {settings.warmup_steps}, but the run has {total} updates: the learning rate "
            "would never reach its peak; lower train.warmup_steps, or raise train.num_train_epochs"
        )
    return total
