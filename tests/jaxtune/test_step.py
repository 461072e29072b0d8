"""The train step: what it computes, what it keeps in memory, and that it is one program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import accumulated, decoder_config, frozen_tree, lora_tree, packed_batch, random_documents

import jaxtune.linear
import jaxtune.step
from jaxtune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.config_io import fingerprint
from jaxtune.devices import sheet
from jaxtune.host_embedding import HostEmbedding
from jaxtune.linear import Adaptation
from jaxtune.lora import init_lora
from jaxtune.models import attention as attention_of_layers
from jaxtune.optim import adamw_8bit
from jaxtune.preflight import in_any_order
from jaxtune.step import (
    StepConfig,
    TrainState,
    accumulate,
    batch_loss,
    batch_sharding,
    init_state,
    jit_eval_step,
    jit_train_step,
    make_mesh,
    replicated,
    state_sharding,
)
from jaxtune.structure import step_settings
from pallas_kernels._triton import interpreted
from pallas_kernels.sliced_mlp import sliced_mlp

DECODER = decoder_config()
LORA = LoraConfig(r=4, lora_alpha=8)
STEP = StepConfig(DECODER, Adaptation(2.0), jnp.float32, remat="none")


def loss_and_gradient(config: StepConfig, batch: dict, lora: dict | None = None, key: jax.Array | None = None) -> tuple:
    lora = lora_tree(config.decoder, LORA) if lora is None else lora
    frozen = frozen_tree(config.decoder)
    return jax.jit(lambda lora, frozen, batch: accumulate(lora, frozen, batch, config, key, 1.0))(lora, frozen, batch)


def assert_trees_close(actual: dict, expected: dict, relative: float) -> None:
    """Each leaf within `relative` of the expected leaf's largest element."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=relative * np.abs(e).max()), actual, expected
    )


def assert_rounded_once(actual: dict, expected: dict) -> None:
    """Each leaf is the expected one in bfloat16, which has 8 bits."""
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=2**-8, atol=1e-5 * np.abs(e).max()),
        actual,
        expected,
    )


def test_packed_documents_give_the_loss_and_gradients_of_separate_rows() -> None:
    documents = random_documents(DECODER, [9, 30, 17, 5, 23, 40])
    packed = packed_batch(DECODER, documents, rows=3, length=64)
    rows = [packed_batch(DECODER, [document], rows=1, length=40) for document in documents]
    separate = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    assert packed["segment_ids"].max() > 1 == separate["segment_ids"].max()
    loss, gradient = loss_and_gradient(STEP, accumulated(packed))
    expected_loss, expected_gradient = loss_and_gradient(STEP, accumulated(separate))
    unmasked = dataclasses.replace(STEP, packed=False)
    causal_loss, causal_gradient = loss_and_gradient(unmasked, accumulated(separate))
    np.testing.assert_allclose([loss, causal_loss], expected_loss, rtol=1e-6)
    assert_trees_close(gradient, expected_gradient, 1e-5)
    assert_trees_close(causal_gradient, expected_gradient, 1e-5)


def test_a_document_does_not_see_its_neighbours() -> None:
    documents = random_documents(DECODER, [20, 20])
    other = [random_documents(DECODER, [20], seed=9)[0], documents[1]]
    first_not_learnt = [[False] * 20, [True] * 20]
    batches = [packed_batch(DECODER, docs, rows=1, length=40, learnt=first_not_learnt) for docs in (documents, other)]
    frozen, lora = frozen_tree(DECODER), lora_tree(DECODER, LORA)
    losses = [float(batch_loss(lora, frozen, batch, STEP, None)) for batch in batches]
    assert losses[0] == losses[1]
    leaky = dataclasses.replace(STEP, packed=False)
    assert float(batch_loss(lora, frozen, batches[0], leaky, None)) != float(
        batch_loss(lora, frozen, batches[1], leaky, None)
    )


def test_accumulation_weighs_tokens_not_micro_batches() -> None:
    documents = random_documents(DECODER, [40, 3, 12, 7])
    rows = [packed_batch(DECODER, [document], rows=1, length=40) for document in documents]

    def micro_batches(count: int) -> dict:
        per = len(rows) // count
        groups = [rows[i * per : (i + 1) * per] for i in range(count)]
        return accumulated(*({name: np.concatenate([r[name] for r in group]) for name in rows[0]} for group in groups))

    results = {count: loss_and_gradient(STEP, micro_batches(count)) for count in (1, 2, 4)}
    for count in (2, 4):
        np.testing.assert_allclose(results[count][0], results[1][0], rtol=1e-6)
        assert_trees_close(results[count][1], results[1][1], 1e-5)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["selective", "full", "offload"])
def test_remat_policies_change_nothing_but_memory(remat: str, unroll: bool) -> None:
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20, 25]), rows=2, length=50))
    loss, gradient = loss_and_gradient(STEP, batch)
    other_loss, other_gradient = loss_and_gradient(dataclasses.replace(STEP, remat=remat, unroll=unroll), batch)
    # The compiler contracts products and sums of the two programs differently: units in the last place.
    np.testing.assert_allclose(other_loss, loss, rtol=5e-7)
    assert_trees_close(other_gradient, gradient, 1e-6)


def test_dropout_repeats_with_its_key_and_survives_remat() -> None:
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20]), rows=1, length=50))
    config = dataclasses.replace(STEP, adaptation=Adaptation(2.0, 0.3))
    key = jax.random.key(5)
    loss, gradient = loss_and_gradient(config, batch, key=key)
    again, gradient_again = loss_and_gradient(dataclasses.replace(config, remat="full"), batch, key=key)
    np.testing.assert_allclose(again, loss, rtol=5e-7)
    assert_trees_close(gradient_again, gradient, 1e-6)
    assert float(loss_and_gradient(config, batch, key=jax.random.key(6))[0]) != float(loss)
    assert float(loss_and_gradient(config, batch)[0]) == float(loss_and_gradient(STEP, batch)[0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_is_asked_for_a_fixed_order(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], attention_of_layers.attention

    def attention(*inputs: jax.Array, **form: object) -> jax.Array:
        asked.append(form["deterministic"])
        return real(*inputs, **form)

    monkeypatch.setattr(attention_of_layers, "attention", attention)
    config = dataclasses.replace(STEP, deterministic=deterministic)
    loss_and_gradient(config, accumulated(packed_batch(DECODER, random_documents(DECODER, [5]), rows=1, length=8)))
    assert set(asked) == {deterministic}


def test_what_does_not_repeat_on_a_gpu_is_left_out_where_the_run_says_so() -> None:
    flag = "xla_gpu_exclude_nondeterministic_ops"
    plain = RunConfig(ModelConfig("model"), DataConfig("data"), OutputConfig("run"))
    same = dataclasses.replace(plain, train=TrainConfig(deterministic=True))
    for run, expected in ((plain, None), (same, True)):
        settings = step_settings(run, DECODER, jnp.bfloat16, "offload")
        options = jaxtune.step._compiler_options(settings, "gpu")
        assert options is not None
        assert options.get(flag) is expected
        assert jaxtune.step._compiler_options(settings, "cpu") is None
    wide = dataclasses.replace(DECODER, head_dim=64)
    capped, packed = dataclasses.replace(wide, attention_cap=50.0), DataConfig("data", packing=True)
    whole = dataclasses.replace(plain, data=DataConfig("data", packing=False))
    said = in_any_order(whole, wide, sheet("a100-80"))
    assert said is not None
    assert "train.deterministic: true repeats to the bit" in said
    others = (dataclasses.replace(whole, train=same.train), dataclasses.replace(plain, data=packed))
    assert [in_any_order(run, wide, sheet("a100-80")) for run in others] == [None, None]
    assert in_any_order(whole, capped, sheet("a100-80")) is in_any_order(whole, wide, sheet("t4")) is None
    # It moves sums by rounding only: a run may be continued with it.
    assert fingerprint(plain) == fingerprint(same)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_mlps_in_chunks_change_nothing_but_memory(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20, 25]), rows=2, length=50))
    config = dataclasses.replace(STEP, adaptation=Adaptation(2.0, rate))
    key = jax.random.key(5) if rate else None
    # 50 tokens of two rows, 16 of each at a time, which does not divide. Dropout is drawn by the chunk.
    monkeypatch.setattr(jaxtune.step, "MLP_CHUNK", {"lean": 32, "none": 32 if rate else None})
    loss, gradient = loss_and_gradient(config, batch, key=key)
    chunked_loss, chunked_gradient = loss_and_gradient(dataclasses.replace(config, remat="lean"), batch, key=key)
    np.testing.assert_allclose(chunked_loss, loss, rtol=5e-7)
    assert_rounded_once(chunked_gradient, gradient)


def test_lean_takes_slices_of_an_mlp_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_config(hidden_size=64, intermediate_size=128, head_dim=16, num_layers=2)
    config = dataclasses.replace(STEP, decoder=decoder)
    batch = accumulated(packed_batch(decoder, random_documents(decoder, [30, 20]), rows=1, length=50))
    loss, gradient = loss_and_gradient(config, batch)
    slices: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        slices.append(named["slices"])
        return sliced_mlp(*arguments, **named)

    monkeypatch.setattr(jaxtune.linear, "sliced_mlp", counted)
    monkeypatch.setattr(jaxtune.step, "MLP_CHUNK", {"lean": 25})
    with interpreted():
        sliced_loss, sliced_gradient = loss_and_gradient(dataclasses.replace(config, remat="lean"), batch)
    # Of one layer forward and, computed again, backward.
    assert slices == [2, 2]
    np.testing.assert_allclose(sliced_loss, loss, rtol=1e-6)
    assert_rounded_once(sliced_gradient, gradient)


def test_lean_holds_a_chunk_of_an_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtune.step, "MLP_CHUNK", {"lean": 16})

    def growth(remat: str) -> int:
        wide, narrow = (temporaries(remat, layers=4, vocab=64, intermediate=width) for width in (2048, 512))
        return wide - narrow

    # Of 128 tokens the products of gate and up and their gradients, and the unit and its own: six widths or more.
    inner = 6 * 4 * 128 * (2048 - 512)
    assert growth("full") - growth("lean") > 0.7 * inner


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20]), rows=1, length=50))
    frozen, lora = frozen_tree(DECODER), lora_tree(DECODER, LORA)
    gradient = loss_and_gradient(STEP, batch, lora)[1]
    norm = float(optax.tree.norm(gradient))
    optimizer = optax.sgd(1.0)
    step = jit_train_step(optimizer, dataclasses.replace(STEP, max_grad_norm=norm / 4), make_mesh())
    # The step donates its state: `lora` is not to be read after it.
    before = jax.tree.map(np.asarray, lora)
    state, metrics = step(init_state(lora, optimizer, 0, jnp.float32), frozen, batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    change = jax.tree.map(lambda new, old: old - new, state.lora, before)
    assert_trees_close(change, jax.tree.map(lambda g: g / 4, gradient), 1e-4)


def test_paged_optimizer_state_waits_in_host_memory_and_changes_no_bit() -> None:
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20]), rows=1, length=50))
    optimizer, mesh, frozen = adamw_8bit(1e-2), make_mesh(), frozen_tree(DECODER)

    def three_steps(paged: bool) -> TrainState:
        state = init_state(lora_tree(DECODER, LORA), optimizer, 0, jnp.float32)
        state = jax.device_put(state, state_sharding(mesh, paged=paged))
        step = jit_train_step(optimizer, dataclasses.replace(STEP, paged=paged), mesh)
        for _ in range(3):
            state, _ = step(state, frozen, batch)
        assert step._cache_size() == 1
        return state

    here, paged = three_steps(False), three_steps(True)
    jax.tree.map(np.testing.assert_array_equal, paged.lora, here.lora)
    jax.tree.map(np.testing.assert_array_equal, paged.opt_state, here.opt_state)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(paged.opt_state)} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(paged.lora)} == {"device"}


def test_rows_of_the_embedding_may_come_with_the_batch() -> None:
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20]), rows=1, length=50))
    frozen, lora = frozen_tree(DECODER), lora_tree(DECODER, LORA)
    embedding = HostEmbedding(frozen)
    assert "embed_tokens" not in embedding.without_table
    loss, gradient = accumulate(lora, frozen, batch, STEP, None, 1.0)
    rows = embedding.rows(batch["tokens"], batch_sharding(make_mesh()))
    assert rows.sharding.memory_kind == "pinned_host"
    compiled = jax.jit(lambda batch: accumulate(lora, embedding.without_table, batch, STEP, None, 1.0))
    other_loss, other_gradient = compiled({**batch, "embedded": rows})
    np.testing.assert_allclose(other_loss, loss, rtol=5e-7)
    assert_trees_close(other_gradient, gradient, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, embedding.whole, dict(frozen))


def test_float16_skips_an_overflowing_update_and_halves_the_scale() -> None:
    config = dataclasses.replace(STEP, dtype=jnp.float16)
    frozen = frozen_tree(DECODER, dtype=jnp.float16)
    batch = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20]), rows=1, length=50))
    optimizer = optax.adam(1e-3)
    state = init_state(lora_tree(DECODER, LORA), optimizer, 0, jnp.float16)
    step = jit_train_step(optimizer, config, make_mesh())
    before = jax.tree.map(np.asarray, state.lora)
    huge = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**24)))
    state, metrics = step(huge, frozen, batch)
    assert not np.isfinite(metrics["grad_norm"])
    assert float(state.loss_scale.scale) == 2.0**23
    jax.tree.map(np.testing.assert_array_equal, state.lora, before)
    for _ in range(20):
        state, metrics = step(state, frozen, batch)
    assert np.isfinite(metrics["grad_norm"])
    assert float(state.loss_scale.scale) < 2.0**23
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.lora), jax.tree.leaves(before)))
    exact = loss_and_gradient(STEP, batch)[0]
    np.testing.assert_allclose(
        step(init_state(lora_tree(DECODER, LORA), optimizer, 0, jnp.float16), frozen, batch)[1]["loss"],
        exact,
        rtol=5e-3,
    )


def test_one_program_for_a_whole_run() -> None:
    frozen, optimizer, mesh = frozen_tree(DECODER), optax.adam(1e-3), make_mesh()
    state = jax.device_put(init_state(lora_tree(DECODER, LORA), optimizer, 0, jnp.float32), replicated(mesh))
    step = jit_train_step(optimizer, STEP, mesh)
    for seed in range(3):
        documents = random_documents(DECODER, [30 + seed, 20 - seed], seed)
        state, _ = step(state, frozen, accumulated(packed_batch(DECODER, documents, rows=1, length=50)))
    assert step._cache_size() == 1
    assert int(state.step) == 3


def temporaries(remat: str, *, layers: int, vocab: int, intermediate: int = 512, learns: bool = True) -> int:
    """Temporary bytes of a compiled train step over 128 tokens, or of one that measures the loss alone."""
    decoder = decoder_config(
        hidden_size=256,
        intermediate_size=intermediate,
        head_dim=64,
        num_layers=layers,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    optimizer, config = optax.adam(1e-3), StepConfig(decoder, Adaptation(2.0), jnp.float32, remat=remat, loss_chunk=16)
    frozen = jax.eval_shape(lambda: frozen_tree(decoder))
    state = jax.eval_shape(lambda: init_state(init_lora(LORA, decoder), optimizer, 0, jnp.float32))
    batch = accumulated(packed_batch(decoder, [[1] * 128], rows=1, length=128))
    if learns:
        lowered = jit_train_step(optimizer, config, make_mesh()).lower(state, frozen, batch)
    else:
        lowered = jit_eval_step(config, make_mesh()).lower(state.lora, frozen, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_no_dense_copy_of_the_weights_and_no_second_copy_of_the_packed_ones(remat: str) -> None:
    growth = temporaries(remat, layers=12, vocab=64) - temporaries(remat, layers=4, vocab=64)
    weights_per_layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512
    # float32 values per token and layer. full: the layer's input. none: five of the model's width (inputs of norms,
    # both normalised, attention's output), q, k, v, three of the MLP's width, two norms' statistics. selective: the
    # residual stream before and after attention, queries, keys and values, attention's output and statistics.
    kept = {"full": 256, "none": 5 * 256 + (4 + 2 + 2) * 64 + 3 * 512 + 2, "selective": 3 * 256 + (4 + 2 + 2) * 64 + 4}
    adapter_gradients = 4 * 2 * sum(r * 4 for r in (512, 384, 384, 512, 768, 768, 768))
    # An eighth of the packed bytes is far less than one copy of them, which is an eighth of a dense one.
    assert growth < 8 * (kept[remat] * 4 * 128 + adapter_gradients + weights_per_layer / 2 / 8)


def test_logits_are_not_held() -> None:
    large = temporaries("full", layers=2, vocab=8192)
    growth = large - temporaries("full", layers=2, vocab=4096)
    chunk_logits, all_logits = 4 * 16 * 4096, 4 * 128 * 4096
    assert growth < 4 * chunk_logits < all_logits
    # Measuring held-out loss takes no more than learning does.
    assert temporaries("full", layers=2, vocab=8192, learns=False) <= large
