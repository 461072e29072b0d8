"""Write a random-weight Llama with a tokenizer and random text, for benchmarks: nothing is downloaded.

    python benchmarks/make_random_model.py DIR [--size llama3-8b | tiny]

Weights are normal with standard deviation 0.02, norms are one, bf16 in shards of 4 GB. The tokenizer has one token for
each byte, so a text of n ASCII characters is n tokens (and the two that mark its ends). `train.jsonl` has 128 texts,
each longer than 8,192 tokens; `documents.jsonl` has 1,500 of usual lengths, log-normal around 490 tokens, for packing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from convert.families import get
from convert.safetensors_io import TensorInfo, write_json, write_model

SIZES = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


def hf_config(size: str) -> dict[str, object]:
    """A Llama 3 config.json of the given size."""
    return SIZES[size] | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_weights(directory: Path, config: dict[str, object], seed: int) -> int:
    """Write the shards; returns the number of parameters."""
    slots = {slot.name: slot.shape for slot in get("llama").slots(config)}
    infos = {name: TensorInfo(np.dtype(jnp.bfloat16), shape) for name, shape in slots.items()}
    keys = {name: jax.random.fold_in(jax.random.key(seed), index) for index, name in enumerate(slots)}

    def read(name: str) -> np.ndarray:
        if name.endswith("norm.weight"):
            return np.ones(slots[name], jnp.bfloat16)
        return np.asarray((0.02 * jax.random.normal(keys[name], slots[name])).astype(jnp.bfloat16))

    write_model(directory, infos, read, max_shard_bytes=4 * 10**9)
    return sum(int(np.prod(shape)) for shape in slots.values())


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes that puts <|begin|> before a text; <|end|> is its end-of-sequence token."""
    special = ["<|begin|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    fast.save_pretrained(directory)


def write_texts(path: Path, seed: int, count: int = 128, length: int = 8300) -> None:
    """Random printable ASCII, one JSON record a line."""
    letters = np.random.default_rng(seed).integers(33, 127, (count, length), dtype=np.uint8)
    path.write_text("".join(json.dumps({"text": row.tobytes().decode()}) + "\n" for row in letters), encoding="utf-8")


def write_documents(path: Path, seed: int, count: int = 1500) -> None:
    """Random printable ASCII of log-normal length (median 490, at least 50, at most 1,998), one JSON record a line."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(6.2, 0.7, count), 50, 1998).astype(int)
    texts = (rng.integers(33, 127, length, dtype=np.uint8).tobytes().decode() for length in lengths)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a random-weight Llama with a tokenizer and random text.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="llama3-8b")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    started = time.perf_counter()
    options.directory.mkdir(parents=True)
    config = hf_config(options.size)
    count = write_weights(options.directory, config, options.seed)
    write_json(options.directory / "config.json", config)
    write_tokenizer(options.directory)
    write_texts(options.directory / "train.jsonl", options.seed)
    write_documents(options.directory / "documents.jsonl", options.seed)
    print(f"{options.directory}: {count:,} parameters in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
