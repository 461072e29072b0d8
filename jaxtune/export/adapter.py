"""A trained adapter in PEFT's files, and such an adapter read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import ml_dtypes
import numpy as np

from convert import peft
from convert.peft_modules import saved_fields
from jaxtune.config import LINEARS, LoraConfig
from jaxtune.loading import Source, user_errors
from jaxtune.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_peft_adapter(
    directory: str | Path,
    lora: Mapping[str, Any],
    config: LoraConfig,
    source: Source,
    *,
    decoder: DecoderConfig | None = None,
    modules: Mapping[str, np.ndarray] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(base, directory)` loads, in the dtype it was trained in.

    Args:
        directory: made if it is not there.
        lora: the adapter's tree, lora_A [L, R, in] and lora_B [L, out, R].
        config: how it was trained.
        source: the base model; a hub model is recorded with its commit.
        decoder: the base model's; without it the names are Llama's, which all families but Phi-3 share.
        modules: whole tensors that go with it, see jaxtune.export.modules; `decoder` has them in it.
        tokenizer: saved beside the adapter, for one whose tokens or template were changed.
        overwrite: replace an adapter that is already there.

    Raises:
        UserError: an adapter is there and `overwrite` is false.
    """
    alpha = config.lora_alpha
    fields = {
        "base_model_name_or_path": source.name,
        "revision": source.commit,
        "r": config.r,
        # PEFT declares a whole number; a fraction, which it takes as well, is not rounded.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
    }
    if modules:
        assert decoder is not None, "modules are of a model"
        fields |= saved_fields(modules, tied=decoder.tie_word_embeddings)
    tree, names = jax.device_get(dict(lora)), _names(decoder)
    with user_errors():
        peft.save_adapter(directory, tree, fields, **names, modules=modules, overwrite=overwrite)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def load_peft_adapter(
    directory: str | Path, *, decoder: DecoderConfig | None = None, allow_modules: bool = False
) -> tuple[dict[str, Any], LoraConfig]:
    """Read an adapter that PEFT or `save_peft_adapter` wrote; `decoder` as there.

    `allow_modules`: the caller takes what `modules_to_save` stored (jaxtune.export.modules); it is refused else.
    Ranks and factors that single modules have of their own are brought to one, see `convert.peft.load_adapter`.

    Returns:
        The tree of NumPy arrays, bfloat16 or float32 as stored (float16 becomes float32), and its configuration.

    Raises:
        UserError: missing or damaged files, or tensors that do not fit the family.
        NotImplementedError: DoRA and other kinds that compute more than B A x.
    """
    with user_errors():
        lora, fields = peft.load_adapter(directory, **_names(decoder), allow_modules=allow_modules)
    is_bf16 = all(leaf.dtype == ml_dtypes.bfloat16 for leaf in jax.tree.leaves(lora))
    dtype: Literal["fp32", "bf16"] = "bf16" if is_bf16 else "fp32"
    if not is_bf16:
        lora = jax.tree.map(lambda leaf: leaf.astype(np.float32), lora)
    targets = {name for group in lora["layers"].values() for name in group}
    config = LoraConfig(
        r=fields["r"],
        lora_alpha=fields.get("lora_alpha", 8),
        lora_dropout=fields.get("lora_dropout", 0.0),
        target_modules=tuple(name for name in LINEARS if name in targets),
        use_rslora=bool(fields.get("use_rslora")),
        dtype=dtype,
    )
    return lora, config


def _names(decoder: DecoderConfig | None) -> dict[str, Any]:
    """What tells `convert.peft` how the base model's files name its linears."""
    if decoder is None:
        return {}
    return {"model_type": decoder.model_type, "rows": {name: n for name, (n, _) in decoder.linear_shapes().items()}}
