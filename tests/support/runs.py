"""A tiny Llama with a tokenizer of its own and a few records to learn, as files: what a whole run needs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from convert import families
from convert.safetensors_io import TensorInfo, write_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "lemon": "yellow"}

# The rank gives the adapter both kinds of 8-bit optimizer state: tensors of 4096 elements and more, and smaller ones.
RUN: dict[str, dict[str, Any]] = {
    "model": {"double_quant": True},
    "lora": {"r": 48, "lora_alpha": 48, "lora_dropout": 0.1},
    "data": {"max_length": 64},
    "train": {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "remat": "none",
    },
    "output": {"sample_tokens": 4},
}

Command = Callable[..., "subprocess.CompletedProcess[str]"]
WriteRun = Callable[..., Path]
Main = Callable[..., tuple[int, str]]


def question(thing: str) -> dict[str, str]:
    return {"instruction": f"What colour is {thing}?", "output": f"It is {COLOURS[thing]}."}


def save_tokenizer(directory: Path, chat_template: str | None = CHATML) -> None:
    """Byte-level BPE with ChatML, of at most the model's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for thing in COLOURS for text in question(thing).values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1])
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


def save_model(directory: Path, seed: int = 0, chat_template: str | None = CHATML, **changes: Any) -> Path:
    """A model directory as Hugging Face lays it out, with random weights that give moderate logits."""
    config = CONFIG | changes
    rng = np.random.default_rng(seed)
    tensors = {
        slot.name: (rng.normal(size=slot.shape) * 0.1 + ("norm" in slot.name)).astype(np.float32)
        for slot in families.get("llama").slots(config)
    }
    infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_model(directory, infos, tensors.__getitem__)
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory, chat_template)
    return directory


def save_records(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
