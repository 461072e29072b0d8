"""Adapters that bring whole tensors (PEFT's `modules_to_save`): read, run, merged and saved as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peers
import peft
import pytest
import runs
import torch

from convert.__main__ import main as convert
from convert.peft import load_adapter
from convert.peft_modules import load_modules
from convert.safetensors_io import SafetensorsModel, TensorInfo, write_file
from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer
from jaxtune.base import BaseModel, find_base
from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.errors import UserError
from jaxtune.export import load_peft_adapter, save_peft_adapter
from jaxtune.export.modules import adapted_base
from jaxtune.export.run import ExportConfig, export_run
from jaxtune.lora import adaptation

TOLERANCE = 1e-5
VOCABULARY = 330
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "embedding and head": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding and norms": (False, {"modules_to_save": ["embed_tokens", "norm"]}),
    "embedding of a tied model": (True, {"modules_to_save": ["embed_tokens"]}),
    "head of a tied model": (True, {"modules_to_save": ["lm_head"]}),
    "both, tied by PEFT": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


def make(directory: Path, *, tied: bool, settings: dict[str, Any], rows: int | None = None) -> tuple[Any, np.ndarray]:
    """A base model in directory/base and PEFT's adapter of it in directory/adapter, all of it random; its logits."""
    peers.save_random_llama(directory / "base", tie_word_embeddings=tied, vocab_size=VOCABULARY)
    runs.save_tokenizer(directory / "base")
    theirs = peers.load_theirs(directory / "base")
    if rows is not None:
        theirs.resize_token_embeddings(rows, mean_resizing=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **settings)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(theirs, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    adapted.save_pretrained(directory / "adapter")
    tokens = peers.random_tokens(rows or theirs.config.vocab_size, 2, 30)
    return tokens, peers.their_logits(adapted, tokens)


def ours(base: Path, adapter: Path) -> tuple[BaseModel, dict[str, Any], LoraConfig]:
    found = adapted_base(find_base_of(base), adapter)
    lora, config = load_peft_adapter(adapter, decoder=found.decoder, allow_modules=True)
    return found, lora, config


def find_base_of(base: Path) -> BaseModel:
    return find_base(ModelConfig(str(base), load_in_4bit=False, dtype="fp32"))


@pytest.mark.parametrize("case", CASES)
def test_run_merged_and_saved_again(tmp_path: Path, case: str) -> None:
    tied, settings = CASES[case]
    tokens, expected = make(tmp_path, tied=tied, settings=settings)
    base, lora, config = ours(tmp_path / "base", tmp_path / "adapter")
    model = peers.Ours(base.decoder, base.load(), base.source)
    assert peers.relative_error(peers.our_logits(model, tokens, lora, adaptation(config)), expected) < TOLERANCE
    assert base.fingerprint != find_base_of(tmp_path / "base").fingerprint
    # Files to files, for transformers.
    arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    assert convert([*arguments, "--base", "original", "--dtype", "fp32"]) == 0
    merged = peers.load_theirs(tmp_path / "merged")
    assert peers.relative_error(peers.their_logits(merged, tokens), expected) < TOLERANCE
    # Saved again by us, for PEFT.
    save_peft_adapter(tmp_path / "again", lora, config, base.source, decoder=base.decoder, modules=base.modules)
    again = peft.PeftModel.from_pretrained(peers.load_theirs(tmp_path / "base"), tmp_path / "again")
    assert peers.relative_error(peers.their_logits(again, tokens), expected) < TOLERANCE


@pytest.mark.slow
def test_in_the_api_and_exported(tmp_path: Path) -> None:
    """An adapter trained further keeps its whole tensors, and a run's export has them; the tied pair comes apart."""
    tokens, expected = make(tmp_path, tied=True, settings={"modules_to_save": ["embed_tokens"]})
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32", load_in_4bit=False)
    run = tmp_path / "run"
    records = [runs.question(thing) for thing in runs.COLOURS]
    settings = SFTConfig(output_dir=str(run), max_steps=1, per_device_train_batch_size=1, max_length=64)
    SFTTrainer(model, tokenizer, train_dataset=records, args=settings).train()
    names = ("base_model.model.model.embed_tokens.weight",)
    before, after = (
        SafetensorsModel([path / "adapter_model.safetensors"]) for path in (tmp_path / "adapter", run / "adapter")
    )
    assert all(np.array_equal(before.read(name), after.read(name)) for name in names)
    (tmp_path / "text.txt").write_text(" ".join(runs.COLOURS))
    config = ExportConfig("merged", tmp_path / "merged", dtype="fp32", text=tmp_path / "text.txt", max_difference=1e-4)
    merged = peers.load_theirs(export_run(run, config))
    with pytest.raises(NotImplementedError, match="no form for whole tensors"):
        export_run(run, ExportConfig("gguf-lora", tmp_path / "lora"))
    again = peft.PeftModel.from_pretrained(peers.load_theirs(tmp_path / "base"), run / "adapter")
    found = peers.their_logits(again, tokens)
    assert 0 < peers.relative_error(found, expected) < 0.1
    assert peers.relative_error(peers.their_logits(merged, tokens), found) < 1e-4


def test_longer_vocabulary(tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens", "lm_head"]}
    tokens, expected = make(tmp_path, tied=False, settings=settings, rows=VOCABULARY + 3)
    base, lora, config = ours(tmp_path / "base", tmp_path / "adapter")
    model = peers.Ours(base.decoder, base.load(), base.source)
    assert peers.relative_error(peers.our_logits(model, tokens, lora, adaptation(config)), expected) < TOLERANCE


def test_what_cannot_be_taken(tmp_path: Path) -> None:
    make(tmp_path, tied=False, settings={"modules_to_save": ["embed_tokens", "lm_head"]})
    adapter, base = tmp_path / "adapter", find_base_of(tmp_path / "base")
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        load_adapter(adapter)
    arguments = ["adapter-to-gguf", str(tmp_path / "base"), str(adapter), "--out", str(tmp_path / "x.gguf")]
    assert convert(arguments) == 2
    file = SafetensorsModel([adapter / "adapter_model.safetensors"])
    tensors = {name: np.array(file.read(name)) for name in file.infos}
    head = "base_model.model.lm_head.weight"
    strange = {
        head: tensors[head][:-1],
        "base_model.model.model.stranger.weight": tensors[head],
        "base_model.model.model.norm.weight": np.zeros(3, ml_dtypes.bfloat16),
    }
    rewrite(adapter, tensors | strange)
    with pytest.raises(UserError, match=r"stranger(.|\n)*lm_head.*shape(.|\n)*norm.*shape"):
        adapted_base(base, adapter)
    linear = "base_model.model.model.layers.0.mlp.up_proj.weight"
    rewrite(adapter, tensors | {linear: np.zeros((2, 2), np.float32)})
    with pytest.raises(NotImplementedError, match="up_proj"):
        adapted_base(base, adapter)
    rewrite(adapter, tensors | {head: np.full_like(tensors[head], np.nan)})
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN"):
        adapted_base(base, adapter).load()
    rewrite(adapter, {name: tensor for name, tensor in tensors.items() if ".lora_" in name})
    with pytest.raises(UserError, match="none of modules_to_save"):
        adapted_base(base, adapter)


def rewrite(adapter: Path, tensors: dict[str, np.ndarray]) -> None:
    infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(adapter / "adapter_model.safetensors", infos, tensors.__getitem__, overwrite=True)


def test_adapters_without_any_are_as_before(tmp_path: Path) -> None:
    peers.save_random_llama(tmp_path / "base")
    runs.save_tokenizer(tmp_path / "base")
    base = find_base_of(tmp_path / "base")
    peers.add_adapter(peers.load_theirs(tmp_path / "base"), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    assert adapted_base(base, tmp_path / "adapter") is base
    hf_config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert load_modules(tmp_path / "adapter", hf_config) == ({}, hf_config)
