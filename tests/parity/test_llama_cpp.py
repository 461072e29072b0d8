"""What llama.cpp itself makes of our files; skipped where it is not fetched (tests/support/llamacpp.py)."""

from __future__ import annotations

import json
from pathlib import Path

import family_cases
import jax
import llamacpp
import numpy as np
import peers
import pytest
import runs

from convert.__main__ import main as convert
from jaxtune.config import LoraConfig
from jaxtune.export import save_peft_adapter
from jaxtune.lora import adaptation, init_lora

LORA = LoraConfig(r=3, lora_alpha=8)


# Llama's queries and keys stand in another order there, Phi-3 has two and three linears in one.
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Phi-3"])
def test_adapter(tmp_path: Path, name: str) -> None:
    """A GGUF file and an adapter's on it compute what the two do here."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    family_cases.save(base, family_cases.PLAIN[name], vocab_size=330, hidden_size=56)
    runs.save_tokenizer(base)
    ours = peers.load_ours(base)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: init_lora(LORA, ours.decoder))
    lora = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
    save_peft_adapter(adapter, lora, LORA, ours.source, decoder=ours.decoder)
    model, on_it = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    assert convert(["to-gguf", str(base), "--out", str(model), "--type", "F32"]) == 0
    assert convert(["adapter-to-gguf", str(base), str(adapter), "--out", str(on_it), "--type", "F32"]) == 0
    tokens = peers.random_tokens(330, 1, 40)
    plain, expected = (peers.our_logits(ours, tokens, tree, adaptation(LORA)) for tree in ({}, lora))
    with llamacpp.LlamaCpp(model, on_it, context=64) as theirs:
        found = theirs.logits(tokens[0].tolist())[None]
    # Its table of GELU has float16 entries.
    tolerance = 1e-3 if json.loads((base / "config.json").read_text())["model_type"].startswith("gemma") else 1e-5
    assert peers.relative_error(found, expected) < tolerance
    assert peers.relative_error(plain, expected) > 0.05
