"""Small random models as transformers and PEFT compute them, and the same files through our own loading."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from convert.peft import from_peft
from jaxtune import loading
from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import hidden_states, logits

# Widths that are multiples of nothing in particular, four query heads on two of keys and values.
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 44,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# bitsandbytes' AVX-512 code decodes rows wrongly that are no whole blocks of 64.
NF4_SIZES = SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
_NO_ADAPTER = Adaptation()


@dataclasses.dataclass(frozen=True)
class Ours:
    """A model as our loading gives it."""

    decoder: DecoderConfig
    frozen: dict[str, Any]
    source: loading.Source


def save_random_llama(directory: Path, *, seed: int = 0, std: float = 0.15, **changes: Any) -> None:
    """Save a Llama whose every parameter, biases and norms among them, is random enough to matter."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | changes)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)
    model.save_pretrained(directory)


def load_theirs(directory: Path, **settings: Any) -> Any:
    """The model of a directory in float32, as transformers reads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", **settings
    )
    # bitsandbytes repacks its weights for bfloat16 products at the first forward pass in evaluation mode. Nothing else
    # differs between the modes, as long as there is no dropout.
    return model.train()


def nf4_settings() -> transformers.BitsAndBytesConfig:
    """bitsandbytes' NF4 with double quantisation, computed in float32."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def load_ours(name: str | Path, *, load_in_4bit: bool = False) -> Ours:
    """The model of a directory, or of a name that our loading takes, in float32."""
    config = ModelConfig(str(name), load_in_4bit=load_in_4bit, dtype="fp32")
    model = loading.load_model(config, loading.resolve_dtype(config.dtype))
    return Ours(DecoderConfig.from_hf(model.hf_config), model.frozen, model.source)


@functools.partial(jax.jit, static_argnames=("decoder", "adaptation"))
def _logits(frozen: Any, lora: Any, tokens: Any, decoder: DecoderConfig, adaptation: Adaptation) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = hidden_states(frozen, lora, tokens, positions, None, decoder, adaptation, dtype=jnp.dtype(jnp.float32))
    return logits(frozen, hidden, decoder)


def our_logits(
    ours: Ours, tokens: np.ndarray, lora: Mapping[str, Any] | None = None, adaptation: Adaptation = _NO_ADAPTER
) -> np.ndarray:
    """Logits [B, T, V] of token ids [B, T], each row one document."""
    return np.asarray(_logits(ours.frozen, dict(lora or {}), tokens, ours.decoder, adaptation))


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The same of a transformers or PEFT model."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference over the oracle's largest value; infinity for other shapes and what is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def random_tokens(vocab_size: int, *shape: int, seed: int = 7) -> np.ndarray:
    """Token ids, int32."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def add_adapter(model: Any, config: LoraConfig, *, seed: int = 3, std_b: float = 0.0) -> Any:
    """PEFT's model of the same adapter configuration: A as PEFT draws it, B normal with the given deviation."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.target_modules),
            use_rslora=config.use_rslora,
            task_type="CAUSAL_LM",
        ),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and std_b:
            torch.nn.init.normal_(parameter, std=std_b)
    return adapted


def adapter_tree(adapted: Any, *, gradients: bool = False) -> dict[str, Any]:
    """Our tree of the values of a PEFT model's adapter, or of their gradients; copies."""
    tensors = {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            tensor = parameter.grad if gradients else parameter.detach()
            tensors[name.replace(".default.", ".")] = tensor.numpy().copy()
    return from_peft(tensors)


def their_loss(model: Any, documents: Sequence[Sequence[int]], learnt: Sequence[Sequence[bool]]) -> torch.Tensor:
    """Mean negative log likelihood over all learnt tokens of all documents, each of which is run by itself."""
    total, count = torch.zeros(()), 0
    for document, mask in zip(documents, learnt, strict=True):
        tokens, wanted = torch.tensor(document), torch.tensor(mask)[1:]
        predicted = model(tokens[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(predicted[wanted], tokens[1:][wanted], reduction="sum")
        count += int(wanted.sum())
    return total / count
