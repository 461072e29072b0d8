"""Small random models and batches that several tests share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import LoraConfig
from jaxtune.lora import GROUP_OF_LINEAR, init_lora
from jaxtune.models.config import DecoderConfig
from jaxtune.models.rope import rope_from_hf
from pallas_kernels.nf4 import quantize


def decoder_config(**changes: Any) -> DecoderConfig:
    """A three-layer Llama with grouped heads; sizes that are multiples of nothing in particular."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "norm_eps": 1e-5,
        "activation": "silu",
        "tie_word_embeddings": False,
        "max_position": 512,
    }
    values |= changes
    return DecoderConfig(
        **values, rope=rope_from_hf({"rope_theta": 10000.0}, values["head_dim"], values["max_position"])
    )


def frozen_tree(config: DecoderConfig, *, nf4: bool = True, dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    """Random frozen weights in the tree's layout."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.1) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    layers: dict[str, Any] = {"self_attn": {}, "mlp": {}}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layers[norm] = {"scale": 1 + normal(config.num_layers, config.hidden_size)}
    for name, (n, k) in config.linear_shapes().items():
        weight = normal(config.num_layers, n, k)
        layers[GROUP_OF_LINEAR[name]][name] = {"kernel": quantize(weight) if nf4 else weight}
    tree = {
        "embed_tokens": {"embedding": normal(config.vocab_size, config.hidden_size, scale=1.0)},
        "layers": layers,
        "norm": {"scale": 1 + normal(config.hidden_size)},
    }
    if not config.tie_word_embeddings:
        tree["lm_head"] = {"kernel": normal(config.vocab_size, config.hidden_size, scale=0.3)}
    return tree


def lora_tree(config: DecoderConfig, lora: LoraConfig, *, seed: int = 1) -> dict[str, Any]:
    """An adapter whose B is not zero, so that every gradient is alive."""
    leaves, structure = jax.tree.flatten(init_lora(lora, config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [leaf + 0.05 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    )


def packed_batch(
    config: DecoderConfig, documents: list[list[int]], *, rows: int, length: int, learnt: list[list[bool]] | None = None
) -> dict[str, np.ndarray]:
    """Documents (token ids) laid one after another into rows, each learnt from its second token on."""
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    batch["loss_weights"] = np.zeros((rows, length), np.float32)
    row, at, segment = 0, 0, 1
    for index, document in enumerate(documents):
        n = len(document)
        if at + n > length:
            row, at, segment = row + 1, 0, 1
        batch["tokens"][row, at : at + n] = document
        batch["targets"][row, at : at + n - 1] = document[1:]
        batch["positions"][row, at : at + n] = np.arange(n)
        batch["segment_ids"][row, at : at + n] = segment
        batch["loss_weights"][row, at : at + n - 1] = 1.0 if learnt is None else learnt[index][1:]
        at, segment = at + n, segment + 1
    return batch


def random_documents(config: DecoderConfig, lengths: list[int], seed: int = 2) -> list[list[int]]:
    """Documents of the given lengths, of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, config.vocab_size, n).tolist() for n in lengths]


def accumulated(*micros: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Micro-batches [B, T] stacked into one batch [accumulation, B, T]."""
    return {name: np.stack([micro[name] for micro in micros]) for name in micros[0]}
