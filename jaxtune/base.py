"""A base model as a run sees it before its weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxtune.config import ModelConfig
from jaxtune.loading import (
    Source,
    check_weights,
    fingerprint,
    load_model,
    load_tokenizer,
    read_hf_config,
    resolve_dtype,
    resolve_source,
)
from jaxtune.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model, known but for its weights.

    dtype: compute dtype. fingerprint: hash of its content, which a resumed run must find again. load: gives the frozen
    parameters on the device, read from the files or as they stand there already; from files also over a mesh, given
    what `mesh.placing` makes, and calling `progress` as `load_model` does. modules: whole tensors by HF name that an
    adapter brings in place of the base's (jaxtune.export.modules). hf_config: of the model with them, else None.
    own_tokenizer: the tokenizer where it is one that an adapter brings, and that is saved with it again; else None.
    """

    source: Source
    tokenizer: PreTrainedTokenizerFast
    decoder: DecoderConfig
    dtype: jnp.dtype
    fingerprint: str
    load: Callable[..., Any]
    hf_config: Mapping[str, Any] | None = None
    modules: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    own_tokenizer: PreTrainedTokenizerFast | None = None


def find_base(config: ModelConfig) -> BaseModel:
    """Find a base model's files and read what is small; its weights are left to `load`, but for whether they fit."""
    source = resolve_source(config)
    decoder = DecoderConfig.from_hf(read_hf_config(source))
    dtype = resolve_dtype(config.dtype)
    check_weights(config, dtype, source)
    return BaseModel(
        source,
        load_tokenizer(source),
        decoder,
        dtype,
        fingerprint(source),
        load=lambda place=None, progress=None: (
            load_model(config, dtype, source=source, place=place, progress=progress).frozen
        ),
    )
