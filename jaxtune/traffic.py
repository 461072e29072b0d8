"""What a run would send between devices in an update, of any mesh, from the model's config alone: the step is traced
for a mesh that need not be here, and no device is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxtune.collectives import Collective, collectives
from jaxtune.config import RunConfig
from jaxtune.mesh import check_mesh, make_parts, split_linears
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import make_optimizer
from jaxtune.parts import AXES
from jaxtune.step import jit_train_step
from jaxtune.structure import batch_structure, frozen_structure, state_structure, step_settings
from pallas_kernels.cross_entropy import chunk_tokens

# Bytes a second that a device sends one way: three quarters of the data sheets' rates.
LINKS = {"NVLink 4": 340e9, "a 400 Gb/s network": 37e9, "PCIe 4": 24e9}


def scaling(sent: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The share of perfect scaling over each of LINKS where nothing overlaps.

    sent: bytes in an update, by axes. seconds: of an update that sends nothing.
    """
    return {link: seconds / (seconds + sum(sent.values()) / rate) for link, rate in LINKS.items()}


def step_collectives(config: RunConfig, hf_config: Mapping[str, Any], dtype: Any, policy: str) -> list[Collective]:
    """The exchanges of one update under a policy of `remat.POLICIES`; none on one device.

    The loss is counted as if every token were learnt.

    Raises:
        UserError: the model cannot be spread over the mesh so.
    """
    if config.mesh.devices == 1:
        return []
    decoder = DecoderConfig.from_hf(hf_config)
    check_mesh(config.mesh, decoder, config.data.max_length)
    sizes = tuple(getattr(config.mesh, axis) for axis in AXES)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    state = state_structure(config, decoder, dtype)
    whole = frozen_structure(hf_config, config.model, dtype)
    frozen = jax.eval_shape(lambda tree: split_linears(tree, config.mesh.tensor), whole)
    parts = make_parts(mesh, frozen, state)
    assert parts is not None
    settings = dataclasses.replace(step_settings(config, decoder, dtype, policy), parts=parts)
    step: Any = jit_train_step(make_optimizer(config.train, 1000), settings, mesh)
    axes = () if parts.vocabulary is None else parts.vocabulary.axes
    words = decoder.vocab_size // math.prod(parts.sizes[axis] for axis in axes)
    # As `linear_cross_entropy` cuts rows into chunks.
    rows = config.train.batch_size // config.mesh.data
    rows = rows if "fsdp" in axes else rows // config.mesh.fsdp
    length = config.data.max_length // config.mesh.sequence
    per_row = max(1, min(length, (config.train.loss_chunk or chunk_tokens(words)) // rows))
    return collectives(step.trace(state, frozen, batch_structure(config)), chunks=math.ceil(length / per_row))


def sent_bytes(found: list[Collective], config: RunConfig) -> dict[str, float]:
    """Bytes that each device sends in an update, by the axes of the mesh along which it does."""
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    sent: dict[str, float] = {}
    for each in found:
        axes = " x ".join(axis for axis in each.axes if sizes[axis] > 1)
        sent[axes] = sent.get(axes, 0.0) + each.sent(sizes)
    return sent
