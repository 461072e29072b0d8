"""Adapters change hands: ours computes the same in PEFT, and PEFT's the same here."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import peft
import pytest

from jaxtune.config import LoraConfig
from jaxtune.export import load_peft_adapter, save_peft_adapter
from jaxtune.lora import adaptation, init_lora

TOLERANCE = 1e-5
CONFIGS = {
    "all linears": LoraConfig(r=4, lora_alpha=8),
    "rslora on some": LoraConfig(r=5, lora_alpha=7.5, use_rslora=True, target_modules=("v_proj", "o_proj", "up_proj")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ours_in_peft(tmp_path: Path, config: LoraConfig) -> None:
    peers.save_random_llama(tmp_path / "base")
    ours, theirs = peers.load_ours(tmp_path / "base"), peers.load_theirs(tmp_path / "base")
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, 40)
    before = peers.their_logits(theirs, tokens)
    rng = np.random.default_rng(6)
    shapes = jax.eval_shape(lambda: init_lora(config, ours.decoder))
    lora = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, leaf.dtype), shapes)
    save_peft_adapter(tmp_path / "adapter", lora, config, ours.source)
    expected = peers.their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter"), tokens)
    assert peers.relative_error(expected, before) > 0.05
    computed = peers.our_logits(ours, tokens, lora, adaptation(config))
    assert peers.relative_error(computed, expected) < TOLERANCE


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_theirs_here_over_nf4(tmp_path: Path, config: LoraConfig) -> None:
    peers.save_random_llama(tmp_path / "dense", **peers.NF4_SIZES)
    theirs = peers.load_theirs(tmp_path / "dense", quantization_config=peers.nf4_settings())
    theirs.save_pretrained(tmp_path / "packed")
    ours = peers.load_ours(tmp_path / "packed", load_in_4bit=True)
    adapted = peers.add_adapter(theirs, config, std_b=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    lora, loaded = load_peft_adapter(tmp_path / "adapter")
    assert loaded == config
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, 40)
    computed = peers.our_logits(ours, tokens, jax.tree.map(jnp.asarray, lora), adaptation(loaded))
    assert peers.relative_error(computed, peers.their_logits(adapted, tokens)) < TOLERANCE
