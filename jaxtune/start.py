"""Where a run's adapter starts: a new one, or a PEFT adapter that is trained further."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.base import BaseModel
from jaxtune.config import LoraConfig
from jaxtune.errors import UserError
from jaxtune.export.modules import adapted_base
from jaxtune.generate import load_adapter
from jaxtune.lora import DTYPES

# What the adapter that is saved in the end will say of itself.
_OF_ADAPTER = ("r", "lora_alpha", "target_modules", "use_rslora")


def start_from(config: LoraConfig, base: BaseModel) -> tuple[BaseModel, Any]:
    """The base model, with what the adapter of `lora.start_from` brings beside its matrices, and these; None for new.

    Whole tensors (PEFT's modules_to_save) and a tokenizer of its own take the place of the base model's.

    Raises:
        UserError: files that are missing or damaged, an adapter of another model, or one of other settings.
        NotImplementedError: an adapter that computes more than B A x.
    """
    if config.start_from is None:
        return base, None
    directory = Path(config.start_from).expanduser()
    base = adapted_base(base, directory)
    lora, found, tokenizer = load_adapter(directory, base)
    differing = [name for name in _OF_ADAPTER if _as_set(getattr(found, name)) != _as_set(getattr(config, name))]
    if differing:
        raise UserError(
            f"lora.start_from {config.start_from}: the run's settings are not the adapter's; set "
            + ", ".join(f"lora.{name} to {_shown(getattr(found, name))}" for name in differing)
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lora)):
        raise UserError(f"lora.start_from {config.start_from}: the adapter holds NaN or infinities; name another one")
    lora = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, DTYPES[config.dtype]), lora)
    own = None if tokenizer is base.tokenizer else tokenizer
    return dataclasses.replace(base, tokenizer=tokenizer, own_tokenizer=own), lora


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value).lower()
