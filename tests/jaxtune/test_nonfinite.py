"""Updates that are not finite change nothing, are traced to where they began, and end a run that has too many."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import accumulated, decoder_config, frozen_tree, lora_tree, packed_batch, random_documents

from jaxtune.checkpoint import Checkpoints
from jaxtune.config import LoraConfig
from jaxtune.errors import UserError
from jaxtune.linear import Adaptation
from jaxtune.nonfinite import KEPT, MOST_IN_A_ROW, NonfiniteUpdates, Traced, not_finite, skips_at_the_end, trace
from jaxtune.optim import adamw_8bit
from jaxtune.step import StepConfig, TrainState, init_state, jit_train_step, make_mesh
from jaxtune.unchanged import digest, unchanged

DECODER = decoder_config()
LORA = LoraConfig(r=4, lora_alpha=8)
STEP = StepConfig(DECODER, Adaptation(2.0, 0.2), jnp.float32, remat="full", max_grad_norm=1.0)
NAN = Traced("in the output of layer 1", (math.nan,), ())


def micro(seed: int = 2) -> dict[str, np.ndarray]:
    return packed_batch(DECODER, random_documents(DECODER, [20, 25], seed), rows=1, length=48)


def first_of(batch: Any, frozen: Any, lora: Any = None, config: StepConfig = STEP) -> Traced:
    state = init_state(lora or lora_tree(DECODER, LORA), adamw_8bit(1e-3), 0, jnp.float32)
    state = dataclasses.replace(state, step=jnp.int32(1))
    return trace(batch, state, frozen=frozen, config=config, mesh=make_mesh(), place=jax.device_put)


def test_finite_batch_has_no_place_and_finite_sizes() -> None:
    traced = first_of(accumulated(micro(), micro(3)), frozen_tree(DECODER))
    assert traced.where == "nowhere, run again layer by layer"
    assert [sizes.shape for sizes in traced.sizes] == [(DECODER.num_layers + 1,)] * 2
    assert np.isfinite(traced.sizes).all()
    assert np.isfinite(traced.losses).all()


def test_forward_pass_is_traced_to_the_layer() -> None:
    batch = micro()
    for layer in range(DECODER.num_layers):
        frozen = frozen_tree(DECODER)
        scale = frozen["layers"]["post_attention_layernorm"]["scale"]
        frozen["layers"]["post_attention_layernorm"]["scale"] = scale.at[layer, 3].set(jnp.inf)
        traced = first_of(accumulated(batch), frozen)
        assert traced.where == f"in the output of layer {layer}"
        assert np.isfinite(traced.sizes[0][: layer + 1]).all()


def test_embedding_and_micro_batch_are_named() -> None:
    frozen, good, bad = frozen_tree(DECODER), micro(), micro(3)
    bad["tokens"][0, 4] = 100
    good["tokens"][good["tokens"] == 100] = 99
    frozen["embed_tokens"]["embedding"] = frozen["embed_tokens"]["embedding"].at[100].set(jnp.nan)
    assert first_of(accumulated(good, bad), frozen).where == "in the embedded tokens of micro-batch 1"


def test_head_is_named() -> None:
    frozen = frozen_tree(DECODER)
    frozen["lm_head"]["kernel"] = frozen["lm_head"]["kernel"].at[5].set(jnp.inf)
    assert first_of(accumulated(micro()), frozen).where == "in the head and the loss"


def test_backward_pass_is_traced_to_the_last_layer_first() -> None:
    """The product with an input of 1e38 is finite behind a weight of zero; the weight's gradient is not."""
    lora: Any = lora_tree(DECODER, LORA)
    pair = lora["layers"]["mlp"]["down_proj"]
    pair["lora_A"] = pair["lora_A"].at[1].set(3e38 * jnp.sign(pair["lora_A"][1]))
    pair["lora_B"] = pair["lora_B"].at[1].set(0.0)
    config = dataclasses.replace(STEP, adaptation=Adaptation(2.0))
    batch = micro()
    where = first_of(accumulated(batch), frozen_tree(DECODER), lora, config).where
    # Either the product overflows in the forward pass, or the gradient of B does.
    assert where in ("in the output of layer 1", "in the gradients of layer 1 (mlp.down_proj.lora_B)")


@pytest.mark.parametrize("optimizer", [adamw_8bit(1e-2), optax.adamw(1e-2)], ids=["8-bit", "float32"])
def test_update_that_is_not_finite_changes_nothing(optimizer: Any) -> None:
    frozen = frozen_tree(DECODER)
    step = jit_train_step(optimizer, STEP, make_mesh())
    good, bad = accumulated(micro()), accumulated(micro(3))
    bad["tokens"][0, 0, 4] = 100
    good["tokens"][good["tokens"] == 100] = 99
    frozen["embed_tokens"]["embedding"] = frozen["embed_tokens"]["embedding"].at[100].set(jnp.nan)
    state, metrics = step(init_state(lora_tree(DECODER, LORA), optimizer, 0, jnp.float32), frozen, good)
    assert np.isfinite(metrics["loss"])
    kept = jax.device_get(state)
    state, metrics = step(state, frozen, bad)
    assert np.isnan(metrics["loss"])
    assert int(state.step) == 2
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, (after.lora, after.opt_state), (kept.lora, kept.opt_state))
    state, metrics = step(state, frozen, good)
    assert np.isfinite(metrics["loss"])


def test_a_loss_that_overflows_leaves_the_loss_scale() -> None:
    config = dataclasses.replace(STEP, dtype=jnp.float16)
    frozen = frozen_tree(DECODER, dtype=jnp.float16)
    frozen["norm"]["scale"] = frozen["norm"]["scale"].at[0].set(jnp.nan)
    optimizer = adamw_8bit(1e-3)
    state = init_state(lora_tree(DECODER, LORA), optimizer, 0, jnp.float16)
    state, metrics = jit_train_step(optimizer, config, make_mesh())(state, frozen, accumulated(micro()))
    assert np.isnan(metrics["loss"])
    assert state.loss_scale is not None
    assert float(state.loss_scale.scale) == 2.0**16


def test_what_counts() -> None:
    nan, inf = math.nan, math.inf
    assert not_finite({"loss": 1.0, "grad_norm": 2.0}) == []
    assert not_finite({"loss": nan, "grad_norm": nan}) == ["loss", "grad_norm"]
    assert not_finite({"loss": 1.0, "grad_norm": inf}) == ["grad_norm"]
    assert not_finite({"loss": 1.0, "grad_norm": inf, "loss_scale": 2.0}) == []
    assert not_finite({"loss": nan, "grad_norm": nan, "loss_scale": 2.0}) == ["loss"]
    assert not_finite({"loss": 1.0, "grad_norm": inf, "loss_scale": 1.0}) == ["grad_norm"]
    loss, skip = {"loss": 1.0}, {"loss": nan, "skipped": 1}
    assert [skips_at_the_end(list(r)) for r in ((), (loss,), (skip,), (loss, skip, {"a": 1}, skip), (skip, loss))] == [
        0,
        0,
        1,
        2,
        0,
    ]


def small_state() -> TrainState:
    return init_state({"layers": {}}, optax.identity(), 0, jnp.float32)


def test_skips_are_counted_over_a_resume_and_end_the_run(tmp_path: Path) -> None:
    bad, good = {"loss": math.nan, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": 1.0}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN", "skipped": 1}\n')
    updates = NonfiniteUpdates("skip", tmp_path, lambda batch, state: NAN, dict)
    look = partial(updates.met, batch=micro(), state=small_state())
    for step in range(2, MOST_IN_A_ROW):
        assert "first in the output of layer 1; the update is not applied" in str(look(step, bad))
    assert Checkpoints(tmp_path / "nonfinite").steps() == list(range(MOST_IN_A_ROW - KEPT, MOST_IN_A_ROW))
    assert look(MOST_IN_A_ROW, good) is None
    for step in range(20, 19 + MOST_IN_A_ROW):
        look(step, bad)
    with pytest.raises(UserError, match=rf"step 30: loss not finite, .* It is the {MOST_IN_A_ROW}th in a row"):
        look(30, bad)


def test_stop_names_the_way_on(tmp_path: Path) -> None:
    updates = NonfiniteUpdates("stop", tmp_path, lambda batch, state: NAN, dict)
    with pytest.raises(UserError, match=r"`python -m jaxtune.replay --run .* --step 3`.*train.on_nonfinite=skip"):
        updates.met(3, {"loss": 1.0, "grad_norm": math.inf}, micro(), small_state())


def test_adapters_that_did_not_change_are_named() -> None:
    lora: Any = lora_tree(DECODER, LORA)
    before = digest(lora)
    changed = jax.tree.map(lambda x: x + 1, lora)
    assert unchanged(before, changed) is None
    text = str(unchanged(before, lora))
    assert f"did not change 21 of 21 adapters (layer 0 {next(iter(before))}, " in text
    assert ", ...): their gradients are zero" in text
    up = changed["layers"]["mlp"]["up_proj"]
    for part, was in lora["layers"]["mlp"]["up_proj"].items():
        up[part] = up[part].at[2].set(was[2])
    assert "did not change 1 of 21 adapters (layer 2 mlp.up_proj)" in str(unchanged(before, changed))
