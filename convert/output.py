"""Directories that appear whole or not at all, and the files of a model beside its weights."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from convert.checkpoint import Checkpoint
from convert.safetensors_io import refuse_existing, write_json

# A tokenizer's and a model's small files, copied as they are.
_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, which takes the name `path` only when the block ends well.

    Raises:
        ValueError: `path` exists, is no empty directory, and `overwrite` is false.
    """
    path = Path(path)
    if not (path.is_dir() and not any(path.iterdir())):
        refuse_existing([path], overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        replaced = temporary.with_suffix(".old")
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        if replaced.is_dir():
            shutil.rmtree(replaced)
        else:
            replaced.unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_description(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    dtype: np.dtype | str,
    quantization: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Write config.json, and the checkpoint's tokenizer and generation config, into a new model directory.

    Args:
        directory: where the weights are.
        checkpoint: the model that the weights came from.
        dtype: of the weights.
        quantization: config.json's quantization_config, if they are packed.
        tokenizer: an adapter's own, in place of the checkpoint's.

    Raises:
        NotImplementedError: rotary factors of a GGUF file that no Hugging Face config can state.
    """
    config = {key: value for key, value in checkpoint.hf_config.items() if value is not None}
    for stale in ("quantization_config", "torch_dtype", "dtype"):
        config.pop(stale, None)
    if (config.get("rope_scaling") or {}).get("rope_type") == "freq_factors":
        raise NotImplementedError(
            f"{checkpoint.path}: its rotary factors (rope_freqs.weight) follow no recipe that a Hugging Face config "
            "can state; write GGUF instead"
        )
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(directory / "config.json", config | {"dtype": np.dtype(dtype).name})
    if checkpoint.gguf is None:
        for pattern in _BESIDE:
            for file in checkpoint.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, directory / file.name)
    else:
        tokenizer = tokenizer or checkpoint.gguf.build_tokenizer()
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerFast | dict[str, Any]:
    """What `gguf.writer.write_gguf` takes as a model's tokenizer: that of its directory, or a GGUF file's own metadata.

    Raises:
        ValueError: there is no tokenizer.json, or it is damaged.
    """
    if checkpoint.gguf is not None:
        return {key: value for key, value in checkpoint.gguf.metadata.items() if key.startswith("tokenizer.")}
    tokenizer = saved_tokenizer(checkpoint.path)
    if tokenizer is None:
        raise ValueError(f"{checkpoint.path}: tokenizer.json is missing; save the model's fast tokenizer beside it")
    return tokenizer


def saved_tokenizer(directory: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a directory, a model's or an adapter's; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not (directory / "tokenizer.json").is_file():
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{directory}: its tokenizer is damaged ({error}); take the model's own") from error
