"""Training with products in 8 bits: what it comes to beside products in full, and which linears it leaves alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import accumulated, decoder_config, frozen_tree, lora_tree, packed_batch, random_documents

from jaxtune.config import LINEARS, LoraConfig, TrainConfig
from jaxtune.devices import sheet
from jaxtune.errors import UserError
from jaxtune.linear import Adaptation, Fp8
from jaxtune.preflight import check_compute
from jaxtune.step import StepConfig, accumulate, eval_step, jit_eval_step, make_mesh
from jaxtune.structure import fp8_linears

DECODER = decoder_config()
STEP = StepConfig(DECODER, Adaptation(2.0), jnp.float32, remat="none")
LORA = LoraConfig(r=4, lora_alpha=8)
BATCH = accumulated(packed_batch(DECODER, random_documents(DECODER, [30, 20, 25]), rows=2, length=64))


def outcome(fp8: Fp8 | None, weights: Any, **changes: Any) -> tuple[float, Any]:
    config = dataclasses.replace(STEP, fp8=fp8, **changes)
    lora = lora_tree(DECODER, LORA)
    return jax.jit(lambda lora, weights: accumulate(lora, weights, BATCH, config, None, 1.0))(lora, weights)


def cosines(a: Any, b: Any) -> list[float]:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [float(jnp.vdot(x, y) / jnp.linalg.norm(x) / jnp.linalg.norm(y)) for x, y in pairs]


@pytest.fixture(scope="module")
def full() -> tuple[float, Any]:
    return outcome(None, frozen_tree(DECODER))


@pytest.fixture(scope="module")
def in_fp8() -> tuple[float, Any]:
    return outcome(Fp8(), frozen_tree(DECODER))


def test_loss_and_gradients_keep_their_direction(full: Any, in_fp8: Any) -> None:
    assert in_fp8[0] != full[0]
    assert abs(in_fp8[0] / full[0] - 1) < 5e-3
    assert min(cosines(in_fp8[1], full[1])) > 0.99


def test_gradients_alone(full: Any) -> None:
    loss, gradient = outcome(Fp8(exact_forward=True), frozen_tree(DECODER))
    np.testing.assert_allclose(loss, full[0], rtol=1e-6)
    similar = cosines(gradient, full[1])
    assert 0.995 < min(similar) < 1 - 1e-6


@pytest.mark.parametrize(("remat", "unroll"), [("selective", True), ("offload", False)])
def test_remat_policies_change_nothing_but_memory(remat: str, unroll: bool, in_fp8: Any) -> None:
    loss, gradient = outcome(Fp8(), frozen_tree(DECODER), remat=remat, unroll=unroll)
    np.testing.assert_allclose(loss, in_fp8[0], rtol=1e-5)
    # A sum in another order may fall on the other side of a rounding boundary of e4m3, now and then.
    assert min(cosines(gradient, in_fp8[1])) > 0.9999


def test_linears_and_layers_left_out_are_computed_in_full(full: Any, in_fp8: Any) -> None:
    weights = frozen_tree(DECODER)
    loss, gradient = outcome(Fp8(names=LINEARS), weights)
    assert loss == full[0]
    jax.tree.map(np.testing.assert_array_equal, gradient, full[1])
    losses = {float(in_fp8[0]), float(full[0])}
    for part in (Fp8(names=("k_proj", "up_proj")), Fp8(("down_proj",), (1,))):
        loss, gradient = outcome(part, weights)
        losses.add(float(loss))
        assert min(cosines(gradient, full[1])) > 0.99
    assert len(losses) == 4


def test_dense_weights() -> None:
    weights = frozen_tree(DECODER, nf4=False)
    loss, gradient = outcome(Fp8(), weights)
    expected, true = outcome(None, weights)
    assert abs(loss / expected - 1) < 5e-3
    assert min(cosines(gradient, true)) > 0.99


def test_bfloat16(in_fp8: Any) -> None:
    loss, gradient = outcome(Fp8(), frozen_tree(DECODER), dtype=jnp.bfloat16)
    assert abs(loss / in_fp8[0] - 1) < 1e-2
    assert min(cosines(gradient, in_fp8[1])) > 0.99


def test_held_out_loss_is_measured_in_full() -> None:
    weights, lora = frozen_tree(DECODER), lora_tree(DECODER, LORA)
    step = jit_eval_step(dataclasses.replace(STEP, fp8=Fp8()), make_mesh())
    assert float(step(lora, weights, BATCH)[0]) == float(
        jax.jit(eval_step, static_argnums=3)(lora, weights, BATCH, STEP)[0]
    )


def test_settings_of_a_run() -> None:
    assert fp8_linears(TrainConfig(), DECODER) is None
    chosen = TrainConfig(compute="fp8", fp8_exclude=("v_proj", "k_proj"), fp8_exclude_layers=(-1, 0, 2))
    assert fp8_linears(chosen, DECODER) == Fp8(("k_proj", "v_proj"), (0, 2))
    assert fp8_linears(TrainConfig(compute="fp8_backward"), DECODER) == Fp8(exact_forward=True)
    with pytest.raises(UserError, match="are 0 to 2"):
        fp8_linears(dataclasses.replace(chosen, fp8_exclude_layers=(3,)), DECODER)
    with pytest.raises(UserError, match="must be among q_proj"):
        TrainConfig(fp8_exclude=("lm_head",))
    with pytest.raises(UserError, match=r"whole numbers, such as \[0, 1\]"):
        TrainConfig(fp8_exclude_layers=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be one of dtype, fp8, fp8_backward"):
        TrainConfig(compute="fp4")  # type: ignore[arg-type]


def test_devices() -> None:
    settings = TrainConfig(compute="fp8")
    assert check_compute(settings, sheet("h200")) is None
    assert check_compute(settings, sheet("rtx-4090")) is None
    assert check_compute(TrainConfig(), sheet("a100-80")) is None
    with pytest.raises(UserError, match=r"A100.*has compute capability 8.0.*set train.compute to dtype"):
        check_compute(settings, sheet("a100-80"))
