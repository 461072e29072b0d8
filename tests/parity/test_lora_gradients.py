"""The gradient of every adapter matrix against PEFT's, through packed rows and accumulated micro-batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from tiny import accumulated, packed_batch, random_documents

from jaxtune.config import LoraConfig
from jaxtune.lora import adaptation
from jaxtune.step import StepConfig, accumulate

CASES: dict[str, tuple[LoraConfig, dict[str, Any], dict[str, Any]]] = {
    "all linears": (LoraConfig(r=5, lora_alpha=16), {}, {}),
    "rslora": (LoraConfig(r=6, lora_alpha=9, use_rslora=True), {}, {"remat": "none"}),
    "queries and values": (LoraConfig(r=3, lora_alpha=8, target_modules=("q_proj", "v_proj")), {}, {}),
    "one linear of rank one": (LoraConfig(r=1, lora_alpha=1, target_modules=("down_proj",)), {}, {}),
    "biases, tied head": (
        LoraConfig(r=4, lora_alpha=8, target_modules=("k_proj", "o_proj", "gate_proj", "up_proj"), use_rslora=True),
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"loss_chunk": 17},
    ),
    "one document per row": (LoraConfig(r=2, lora_alpha=4), {"num_key_value_heads": 1}, {"packed": False}),
    "tanh gelu": (LoraConfig(r=2, lora_alpha=4), {"hidden_act": "gelu_pytorch_tanh"}, {}),
}


def micro_batch(ours: peers.Ours, documents: Any, learnt: Any, *, packed: bool) -> dict[str, np.ndarray]:
    """Documents in two packed rows, or each in a row of its own that ends in padding."""
    if packed:
        return packed_batch(ours.decoder, documents, rows=2, length=57, learnt=learnt)
    rows = [
        packed_batch(ours.decoder, [document], rows=1, length=40, learnt=[mask])
        for document, mask in zip(documents, learnt, strict=True)
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def check_gradients(ours: peers.Ours, adapted: Any, config: LoraConfig, **settings: Any) -> None:
    """Loss and gradients of ten documents, about half of whose tokens are learnt, in two micro-batches."""
    lora = jax.tree.map(jnp.asarray, peers.adapter_tree(adapted))
    documents = random_documents(ours.decoder, [9, 20, 31, 2, 14, 25, 6, 3, 40, 17])
    rng = np.random.default_rng(4)
    learnt = [(rng.random(len(document)) < 0.5).tolist() for document in documents]
    micros = [
        micro_batch(ours, documents[half], learnt[half], packed=settings.get("packed", True))
        for half in (slice(5), slice(5, None))
    ]
    step = StepConfig(ours.decoder, adaptation(config), jnp.dtype(jnp.float32), **settings)
    loss, gradient = jax.jit(functools.partial(accumulate, config=step, key=None, scale=1.0))(
        lora, ours.frozen, accumulated(*micros)
    )
    expected_loss = peers.their_loss(adapted, documents, learnt)
    expected_loss.backward()
    expected = peers.adapter_tree(adapted, gradients=True)
    assert peers.relative_error(loss, expected_loss.item()) < 1e-5
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    errors = {
        f"{jax.tree_util.keystr(path)}, layer {layer}": peers.relative_error(mine, their)
        for (path, mine_stack), their_stack in zip(
            jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
        )
        for layer, (mine, their) in enumerate(zip(mine_stack, their_stack, strict=True))
    }
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


@pytest.mark.parametrize(("config", "changes", "settings"), CASES.values(), ids=CASES.keys())
def test_gradients(tmp_path: Path, config: LoraConfig, changes: dict[str, Any], settings: dict[str, Any]) -> None:
    peers.save_random_llama(tmp_path, **changes)
    adapted = peers.add_adapter(peers.load_theirs(tmp_path), config, std_b=0.1)
    check_gradients(peers.load_ours(tmp_path), adapted, config, **settings)


def test_gradients_over_nf4(tmp_path: Path) -> None:
    config = LoraConfig(r=5, lora_alpha=16)
    peers.save_random_llama(tmp_path / "dense", **peers.NF4_SIZES)
    theirs = peers.load_theirs(tmp_path / "dense", quantization_config=peers.nf4_settings())
    theirs.save_pretrained(tmp_path / "packed")
    adapted = peers.add_adapter(theirs, config, std_b=0.1)
    check_gradients(peers.load_ours(tmp_path / "packed", load_in_4bit=True), adapted, config)
