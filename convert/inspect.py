"""What a checkpoint holds, in a few lines for people."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from convert import flax_tree
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.peft import WEIGHTS_NAME, check_complete
from convert.peft_config import CONFIG_NAME, read_config
from convert.safetensors_io import SafetensorsModel


def inspect(path: str | os.PathLike[str]) -> str:
    """Family, sizes, tensors by kind and dtype, quantisation, size on disk, and what loading it would do.

    Raises:
        ValueError: nothing that is read here, or tensors that do not fit the config, all of them listed.
        NotImplementedError: a variant that is not read.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():
        return _adapter(path)
    checkpoint = open_checkpoint(path)
    config = checkpoint.hf_config
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    size, files = sum(file.stat().st_size for file in checkpoint.files), len(checkpoint.files)
    lines = [
        f"{path}: {config['model_type']}, {_format(checkpoint)}, {_size(size)} in {files} file{'s' * (files > 1)}",
        f"  {config['num_hidden_layers']} layers, width {config['hidden_size']}, MLP {config['intermediate_size']}, "
        f"{heads} heads on {kv_heads or heads} of keys, vocabulary {config['vocab_size']}, "
        f"context {config.get('max_position_embeddings', 'unknown')}",
    ]
    if flax_tree.is_tree(path):
        adapter = flax_tree.lora_scaling(path) is not None
        what = "refuse it as a base model: an adapter is beside it" if adapter else "restore it bit for bit"
        return "\n".join([*lines, f"  {len(checkpoint.infos)} arrays", f"jaxtune would {what}"])
    stored: dict[tuple[str, str], int] = Counter()
    count: dict[tuple[str, str], int] = Counter()
    for load in {load.slot.name: load for load in checkpoint.loads}.values():
        kind = "linears" if load.slot.is_linear else load.slot.path[0 if load.slot.layer is None else -2]
        dtype = _dtype(checkpoint, load.slot.name, load.is_packed)
        stored[kind, dtype] += sum(_stored_bytes(checkpoint, name) for name in load.sources)
        count[kind, dtype] += 1
    lines += [
        f"  {kind}: {count[kind, dtype]} in {dtype}, {_size(size)}" for (kind, dtype), size in sorted(stored.items())
    ]
    return "\n".join([*lines, f"jaxtune would {_plan(checkpoint)}"])


def _format(checkpoint: Checkpoint) -> str:
    if checkpoint.gguf is not None:
        return "GGUF"
    if flax_tree.is_tree(checkpoint.path):
        return "parameter tree (Orbax)"
    return "safetensors, bitsandbytes 4-bit" if checkpoint.is_packed else "safetensors"


def _dtype(checkpoint: Checkpoint, name: str, packed: bool) -> str:
    if checkpoint.gguf is not None:
        return checkpoint.gguf.tensors[name].type.name
    return "nf4" if packed else checkpoint.infos[name].dtype.name


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    return checkpoint.infos[name].nbytes if checkpoint.gguf is None else checkpoint.gguf.tensors[name].stored_bytes


def _plan(checkpoint: Checkpoint) -> str:
    linears = [load for load in checkpoint.loads if load.slot.is_linear]
    packed = sum(load.is_packed for load in linears)
    if packed:
        rest = "" if packed == len(linears) else f", and keep {len(linears) - packed} linears dense"
        return f"take its {packed} packed linears as they are{rest}"
    return f"quantise its {len(linears)} linears to NF4 (or keep them with model.load_in_4bit: false)"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _adapter(path: Path) -> str:
    check_complete(path)
    config = read_config(path)
    infos = SafetensorsModel([path / WEIGHTS_NAME]).infos
    matches = [match for name in infos if (match := re.search(r"layers\.(\d+)\..*?(\w+)\.lora_[AB]\.weight$", name))]
    linears, layers = (sorted({match[group] for match in matches}) for group in (2, 1))
    dtypes = sorted({info.dtype.name for info in infos.values()})
    return (
        f"{path}: LoRA adapter of {config.get('base_model_name_or_path')}\n"
        f"  rank {config['r']}, alpha {config.get('lora_alpha')}, {', '.join(dtypes)}, "
        f"{len(layers)} layers of {', '.join(linears)}\n"
        "jaxtune would generate with it, export it, or merge it: python -m convert merge BASE ADAPTER"
    )
