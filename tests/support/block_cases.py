"""Weights and models whose quantisation by llama.cpp is recorded, made without a random generator's own laws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from convert import families
from convert.gguf.writer import write_gguf
from convert.safetensors_io import TensorInfo

# A type of block, and a file type that has it for most weights.
KINDS = {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q5_0": "Q5_0", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q6_K": "Q6_K"}
QUANTISED = ("Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q5_K_M", "Q6_K")
MODELS: dict[str, dict[str, Any]] = {
    "untied, 12 layers": {"num_hidden_layers": 12, "tie_word_embeddings": False},
    "tied, 7 layers": {"num_hidden_layers": 7},
    "80 layers of shared values": {"num_hidden_layers": 80, "hidden_size": 256, "intermediate_size": 256},
    "rows of 320 and 96": {"num_hidden_layers": 9, "hidden_size": 320, "intermediate_size": 96},
    "rows of 512 and 40": {"num_hidden_layers": 3, "intermediate_size": 40, "tie_word_embeddings": False},
}


def weights() -> np.ndarray:
    """float32 [96, 512]: bell-shaped rows, and rows that are zero, constant, one-signed, tiny, huge or on a grid."""
    state = np.arange(96 * 512, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(2**64 - 1)
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    parts = [(state >> np.uint64(16 * i) & np.uint64(0xFFFF)).astype(np.float64) / 65536 for i in range(4)]
    matrix = ((sum(parts) - 2) * 0.05).astype(np.float32).reshape(96, 512)
    matrix[1], matrix[2], matrix[3, :256], matrix[4, 32:64] = 0, 0.25, 0, 0
    matrix[5], matrix[6] = np.abs(matrix[5]), -np.abs(matrix[6])
    matrix[7] *= np.float32(1e-6)
    matrix[8] *= np.float32(1e4)
    matrix[9] = np.round(matrix[9] * 64) / 4
    matrix[10, ::7] *= 50
    matrix[11, :16] = 1e-18
    matrix[12] = -0.125
    return matrix


def model(**changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors, by Hugging Face name, of a Llama; weights repeat `weights()`."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    } | changes
    matrix = weights()
    tensors = {slot.name: np.resize(matrix, slot.shape) for slot in families.get("llama").slots(config)}
    return config, tensors


def write(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, file_type: str) -> dict[str, str]:
    """Write the model, without a vocabulary; the types by GGUF name."""
    infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    written = write_gguf(path, config, infos, tensors.__getitem__, None, file_type=file_type, overwrite=True)
    return {name: kind.name for name, kind in written.items()}


def by_kind(types: dict[str, str]) -> dict[str, str]:
    """Types of the matrices, one word a layer where they differ: {"ffn_up": "Q4_K", "attn_v": "Q6_K Q4_K Q4_K ..."}."""
    kinds: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        if kind != "F32":
            layer = re.match(r"blk\.(\d+)\.", name)
            stem = name.removesuffix(".weight").split(".")[-1]
            kinds.setdefault(stem, {})[int(layer[1]) if layer else 0] = kind
    words = {stem: [layers[i] for i in sorted(layers)] for stem, layers in sorted(kinds.items())}
    return {stem: " ".join(types if len(set(types)) > 1 else types[:1]) for stem, types in words.items()}
