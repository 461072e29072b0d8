"""Every family and form against transformers and PEFT on tiny random models: logits, loss, gradients, each layer."""

from __future__ import annotations

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
from tiny import accumulated, packed_batch, random_documents

from jaxtune.config import LoraConfig
from jaxtune.export import save_peft_adapter
from jaxtune.linear import Adaptation, Linears
from jaxtune.lora import adaptation, init_lora
from jaxtune.models.attention import self_attention
from jaxtune.models.context import Context
from jaxtune.models.decoder import block, embed
from jaxtune.models.norm import norm
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
def test_parts(tmp_path: Path, name: str) -> None:
    """The embedding, attention, MLP and whole of layers on the input that transformers gave them, the final norm."""
    family_cases.save(tmp_path, family_cases.PLAIN[name])
    ours, theirs = peers.load_ours(tmp_path), load_theirs(tmp_path)
    decoder, tokens = ours.decoder, peers.random_tokens(ours.decoder.vocab_size, 2, 20)
    # Gemma 3's sixth is the first that sees all.
    chosen = [index for index in (0, 1, 5) if index < decoder.num_layers]
    given: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}

    def note(name: str, _: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given[name] = (inputs[0] if inputs else named["hidden_states"]).numpy()
        expected[name] = (output[0] if isinstance(output, tuple) else output).numpy()

    modules = {"final norm": theirs.model.norm}
    for index in chosen:
        layer = theirs.model.layers[index]
        modules |= {f"attention {index}": layer.self_attn, f"mlp {index}": layer.mlp, f"block {index}": layer}
    for name, module in modules.items():
        module.register_forward_hook(functools.partial(note, name), with_kwargs=True)
    peers.their_logits(theirs, tokens)
    # Some families scale it in the model, some in a module of its own.
    expected["embedding"] = given["block 0"]

    @jax.jit
    def parts(frozen: Any) -> dict[str, jax.Array]:
        found = {
            "embedding": embed(frozen, jnp.asarray(tokens), decoder, jnp.dtype(jnp.float32)),
            "final norm": norm(given["final norm"], frozen["norm"], decoder),
        }
        for index in chosen:
            window = decoder.windows[index % len(decoder.windows)]
            rope = decoder.local_rope if window is not None and decoder.local_rope is not None else decoder.rope
            angles = rope.cos_sin(jnp.broadcast_to(jnp.arange(20), (2, 20)), jnp.full((2, 1), 20))
            context = Context(*angles, None, 0, Adaptation(), window=window)
            base = jax.tree.map(lambda leaf, index=index: leaf[index], frozen["layers"])
            attention, mlp = (Linears(base[part], {}, Adaptation(), None) for part in ("self_attn", "mlp"))
            x = jnp.asarray(given[f"block {index}"])
            normed = norm(x, base["input_layernorm"], decoder)
            qkv = jnp.concatenate([attention.apply(name, normed) for name in ("q_proj", "k_proj", "v_proj")], axis=-1)
            halves = [mlp.apply(name, jnp.asarray(given[f"mlp {index}"])) for name in ("gate_proj", "up_proj")]
            found |= {
                f"attention {index}": self_attention(qkv, attention, context, decoder, None)[0],
                f"mlp {index}": mlp.after_glu("down_proj", jnp.concatenate(halves, axis=-1), decoder.activation),
                f"block {index}": block(x, base, {}, context, decoder)[0],
            }
        return found

    errors = {name: peers.relative_error(value, expected[name]) for name, value in parts(ours.frozen).items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


# Llama and Phi-3 have tests of their own.
@pytest.mark.parametrize("name", [name for name in family_cases.PLAIN if name not in ("Llama", "Phi-3")])
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
