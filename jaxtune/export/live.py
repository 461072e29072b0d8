"""Write a model that is on the device already, adapter included, without reading its weights again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from convert.checkpoint import open_checkpoint
from convert.output import atomic_directory
from jaxtune.config import LoraConfig
from jaxtune.export.targets import Subject, write_ggufs, write_merged, write_merged_4bit
from jaxtune.loading import Source, user_errors
from jaxtune.lora import adaptation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def export_live(
    directory: str | Path,
    target: str,
    source: Source,
    frozen: Mapping[str, Any],
    lora: Mapping[str, Any],
    lora_config: LoraConfig | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    modules: Mapping[str, np.ndarray] | None = None,
    hf_config: Mapping[str, Any] | None = None,
    vocabulary: PreTrainedTokenizerFast | None = None,
    file_types: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a model in another program's form; `python -m jaxtune.export` also reads it back and compares logits.

    The adapter is added to the weights that it was trained with.

    Args:
        directory: made whole or not at all.
        target: merged (dense bfloat16 safetensors), merged-4bit (bitsandbytes NF4) or gguf.
        source: the base model's files. frozen, lora, lora_config: see CONTRIBUTING; no adapter is {} and None.
        tokenizer: saved beside safetensors.
        modules, hf_config, vocabulary: see `Subject`, whose tokenizer the last is.
        file_types: of GGUF files, one each. overwrite: replace what is at `directory`.

    Raises:
        UserError: something in the way, or a GGUF type that cannot be written.
        NotImplementedError: a model that the target has no form for.
    """
    directory = Path(directory)
    with user_errors(), atomic_directory(directory, overwrite=overwrite) as temporary:
        scaling = 1.0 if lora_config is None else adaptation(lora_config).scaling
        of_adapter = jax.device_get(dict(lora)), scaling, modules or {}, hf_config, vocabulary
        subject = Subject(open_checkpoint(source.path), dict(frozen), *of_adapter)
        if target == "gguf":
            write_ggufs(temporary, subject, "dequantized", file_types, directory.name, tokenizer)
        elif target == "merged-4bit":
            write_merged_4bit(temporary, subject, "dequantized", "bf16")
        else:
            assert target == "merged", target
            write_merged(temporary, subject, "dequantized", "bf16")
        if target != "gguf":
            tokenizer.save_pretrained(temporary)
    return directory
