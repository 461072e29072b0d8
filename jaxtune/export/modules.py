"""A base model with the whole tensors that an adapter brings (PEFT's `modules_to_save`); they stay as they are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.peft_modules import load_modules
from jaxtune.base import BaseModel
from jaxtune.errors import UserError
from jaxtune.head import held_like
from jaxtune.loading import read_hf_config, tensors_of, user_errors
from jaxtune.models.config import DecoderConfig


def adapted_base(base: BaseModel, adapter: str | Path) -> BaseModel:
    """The base model of an adapter with the adapter's whole tensors in it, which a run keeps and saves again.

    Raises:
        UserError: tensors that the model has not, or of other shapes.
        NotImplementedError: linears that were trained whole.
    """
    before = read_hf_config(base.source)
    with user_errors():
        modules, hf_config = load_modules(Path(adapter).expanduser(), before)
    if not modules:
        return base
    digest = hashlib.sha256(base.fingerprint.encode())
    for name, tensor in sorted(modules.items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def load(place: Any = None, progress: Any = None) -> Any:
        if place is not None:
            raise NotImplementedError(
                f"adapter {adapter}: its whole tensors (modules_to_save) are not cut over a mesh; train on one device"
            )
        return with_modules(base.load(progress=progress), modules, before, hf_config, base.dtype)

    return dataclasses.replace(
        base,
        decoder=DecoderConfig.from_hf(hf_config),
        fingerprint=digest.hexdigest(),
        load=load,
        hf_config=hf_config,
        modules=modules,
    )


def with_modules(
    frozen: Mapping[str, Any],
    modules: Mapping[str, np.ndarray],
    before: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    dtype: jnp.dtype,
) -> dict[str, Any]:
    """Frozen parameters with `modules` in place of the tensors of their names.

    Args:
        frozen: the base model's, on the device. before: its HF config.
        modules, hf_config: as `convert.peft_modules.load_modules` gave them.
        dtype: compute dtype, which they are held in; but for a head in fewer bits, which remains one.

    Raises:
        UserError: values that are not finite in `dtype`.
    """
    tree = jax.tree.map(lambda leaf: leaf, dict(frozen))
    if before.get("tie_word_embeddings") and not hf_config.get("tie_word_embeddings"):
        tree["lm_head"] = {"kernel": frozen["embed_tokens"]["embedding"]}
    for slot in tensors_of(hf_config):
        if slot.name not in modules:
            continue
        tensor = jax.device_put(np.array(modules[slot.name])).astype(dtype)
        if not jnp.isfinite(tensor).all():
            raise UserError(f"the adapter's {slot.name} holds NaN or numbers beyond {dtype.name}; set model.dtype")
        *parents, key = slot.path
        node = tree
        for parent in parents:
            node = node[parent]
        node[key] = held_like(tensor, node[key]) if slot.layer is None else node[key].at[slot.layer].set(tensor)
    return tree
