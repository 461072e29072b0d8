"""Every family and form against transformers and PEFT on tiny random models: logits, loss, gradients, each layer."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import peers
import peft
import pytest
import torch
from tiny import accumulated, packed_batch, random_documents

from jaxtune.config import LoraConfig
from jaxtune.export import save_peft_adapter
from jaxtune.linear import Adaptation
from jaxtune.lora import adaptation, init_lora
from jaxtune.models.decoder import hidden_states
from jaxtune.step import StepConfig, accumulate

LORA = LoraConfig(r=3, lora_alpha=8)


def load_theirs(directory: Path) -> Any:
    # transformers' default attention leaves soft-caps out.
    return peers.load_theirs(directory, attn_implementation="eager")


@pytest.mark.parametrize("name", family_cases.CASES)
def test_logits(tmp_path: Path, name: str) -> None:
    case = family_cases.CASES[name]
    family_cases.save(tmp_path, case)
    ours = peers.load_ours(tmp_path)
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, case.tokens)
    expected = peers.their_logits(load_theirs(tmp_path), tokens)
    assert peers.relative_error(peers.our_logits(ours, tokens), expected) < 1e-5


@pytest.mark.parametrize("name", family_cases.PLAIN)
def test_each_layer(tmp_path: Path, name: str) -> None:
    """The embedding, and what every layer gives, all behind the final norm."""
    family_cases.save(tmp_path, family_cases.PLAIN[name], num_hidden_layers=3)
    ours, theirs = peers.load_ours(tmp_path), load_theirs(tmp_path)
    tokens = peers.random_tokens(ours.decoder.vocab_size, 2, 20)
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        *before, last = theirs(ids, output_hidden_states=True).hidden_states
        expected = [theirs.model.norm(state) for state in before] + [last]

    @jax.jit
    def states(frozen: Any) -> list[jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        found = []
        for count in range(len(expected)):
            decoder = dataclasses.replace(ours.decoder, num_layers=count)
            places = jnp.asarray(tokens), positions, None
            found.append(hidden_states(frozen, {}, *places, decoder, Adaptation(), dtype=jnp.dtype(jnp.float32))[0])
        return found

    errors = [
        peers.relative_error(mine, their.numpy()) for mine, their in zip(states(ours.frozen), expected, strict=True)
    ]
    assert max(errors) < 1e-5, errors


# Every form of block once: Gemma is a part of Gemma 2, Qwen3 of Gemma 3, and Llama has tests of its own.
@pytest.mark.parametrize("name", ["Qwen2", "Gemma 2", "Gemma 3"])
def test_loss_and_gradients(tmp_path: Path, name: str) -> None:
    """Of an adapter on all linears, through documents packed into rows; theirs are run one by one."""
    family_cases.save(tmp_path, family_cases.PLAIN[name], num_hidden_layers=3)
    ours = peers.load_ours(tmp_path)
    adapted = peers.add_adapter(load_theirs(tmp_path), LORA, std_b=0.1)
    lora = jax.tree.map(jnp.asarray, peers.adapter_tree(adapted))
    documents = random_documents(ours.decoder, [9, 20, 12, 17])
    batch = accumulated(packed_batch(ours.decoder, documents, rows=2, length=31))
    step = StepConfig(ours.decoder, adaptation(LORA), jnp.dtype(jnp.float32))
    loss, gradient = jax.jit(functools.partial(accumulate, config=step, key=None, scale=1.0))(lora, ours.frozen, batch)
    expected = peers.their_loss(adapted, documents, [[True] * len(document) for document in documents])
    expected.backward()
    assert peers.relative_error(loss, expected.item()) < 1e-5
    errors = jax.tree.map(peers.relative_error, gradient, peers.adapter_tree(adapted, gradients=True))
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_gradients_of_linears_that_are_held_as_one(tmp_path: Path) -> None:
    """Of ours in PEFT's form, whose B has blocks on its diagonal: their gradients there are ours."""
    family_cases.save(tmp_path / "base", family_cases.PLAIN["Phi-3"], num_hidden_layers=2)
    ours = peers.load_ours(tmp_path / "base")
    rng = np.random.default_rng(6)
    shapes = jax.eval_shape(lambda: init_lora(LORA, ours.decoder))
    lora = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
    save_peft_adapter(tmp_path / "adapter", lora, LORA, ours.source, decoder=ours.decoder)
    adapted = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    documents = random_documents(ours.decoder, [9, 20])
    batch = accumulated(packed_batch(ours.decoder, documents, rows=1, length=31))
    step = StepConfig(ours.decoder, adaptation(LORA), jnp.dtype(jnp.float32))
    loss, gradient = jax.jit(functools.partial(accumulate, config=step, key=None, scale=1.0))(lora, ours.frozen, batch)
    expected = peers.their_loss(adapted, documents, [[True] * len(document) for document in documents])
    expected.backward()
    assert peers.relative_error(loss, expected.item()) < 1e-5
    rows = {name: n for name, (n, _) in ours.decoder.linear_shapes().items()}
    for index, layer in enumerate(adapted.base_model.model.model.layers):
        for module, group, names in (
            (layer.self_attn.qkv_proj, "self_attn", ("q_proj", "k_proj", "v_proj")),
            (layer.mlp.gate_up_proj, "mlp", ("gate_proj", "up_proj")),
        ):
            a, b = (getattr(module, part)["default"].weight.grad.numpy() for part in ("lora_A", "lora_B"))
            top = 0
            for part, name in enumerate(names):
                mine, columns = gradient["layers"][group][name], slice(part * LORA.r, (part + 1) * LORA.r)
                assert peers.relative_error(mine["lora_A"][index], a[columns]) < 1e-4
                assert peers.relative_error(mine["lora_B"][index], b[top : top + rows[name], columns]) < 1e-4
                top += rows[name]
