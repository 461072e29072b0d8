"""Optimizers against torch's AdamW and their own definition; schedules against transformers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
import transformers

from jaxtune.config import TrainConfig
from jaxtune.optim import Moments32, adamw, adamw_8bit, make_optimizer, make_schedule
from pallas_kernels.adam8bit import Moments8bit

HYPER = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
TORCH_HYPER = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def random_tree(rng: np.random.Generator, shapes: Any) -> Any:
    """Float32 normal arrays of the given shapes."""
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def rate_at(step: Any) -> Any:
    return 1e-2 * 0.95**step


@pytest.mark.parametrize("optimizer", [adamw, adamw_8bit])
def test_float32_moments_equal_torch(optimizer: Any) -> None:
    rng = np.random.default_rng(0)
    params = random_tree(rng, {"layers": {"a": (3, 7, 11)}, "b": (5, 40)})
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(p))) for p in jax.tree.leaves(params)]
    reference = torch.optim.AdamW(theirs, lr=1.0, **TORCH_HYPER)
    ours = optimizer(rate_at, **HYPER)
    state, update = ours.init(params), jax.jit(ours.update)
    assert all(x.dtype != jnp.uint8 for x in jax.tree.leaves(state)), "too small for 8 bits"
    for step in range(50):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        reference.param_groups[0]["lr"] = rate_at(step)
        for param, grad in zip(theirs, jax.tree.leaves(grads)):
            param.grad = torch.tensor(np.asarray(grad))
        reference.step()
        for param, expected in zip(jax.tree.leaves(params), theirs):
            np.testing.assert_allclose(param, expected.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", [adamw, adamw_8bit])
def test_bfloat16_parameters_are_rounded_once_an_update(optimizer: Any) -> None:
    rng = np.random.default_rng(1)
    params = {"a": jnp.asarray(rng.standard_normal((3, 50)), jnp.bfloat16)}
    ours = optimizer(rate_at, **HYPER)
    state = ours.init(params)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    m, v = np.zeros((3, 50)), np.zeros((3, 50))
    for step in range(20):
        grad = jnp.asarray(rng.standard_normal((3, 50)), jnp.bfloat16)
        updates, state = ours.update({"a": grad}, state, params)
        assert updates["a"].dtype == jnp.float32
        g, before = np.asarray(grad, np.float64), np.asarray(params["a"], np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        direction = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
        exact = before - rate_at(step) * (direction + 0.1 * before)
        params = optax.apply_updates(params, updates)
        assert params["a"].dtype == jnp.bfloat16
        after = np.asarray(params["a"], np.float64)
        half_ulp = np.exp2(np.floor(np.log2(np.abs(exact))) - 8)
        assert (np.abs(after - exact) <= half_ulp + 1e-6).all()


def test_blocks_and_sizes_are_those_of_single_layers() -> None:
    rng = np.random.default_rng(2)
    shapes = {"layers": {"large": (3, 50, 100), "small": (3, 63, 65)}, "embed": (63, 66)}
    params = random_tree(rng, shapes)
    ours = adamw_8bit(1e-3, **HYPER)
    state = ours.init(params)
    assert isinstance(state.moments["layers"]["large"], Moments8bit)
    assert isinstance(state.moments["layers"]["small"], Moments32), "4,095 elements a layer"
    assert isinstance(state.moments["embed"], Moments8bit), "4,158 elements"
    assert state.moments["layers"]["large"].m_absmax.shape == (3, 20)
    assert state.moments["embed"].m_codes.shape == (63 * 66,)
    singles = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(3)]
    single_states, update = [ours.init(single) for single in singles], jax.jit(ours.update)
    for scale in (1.0, 1e-3, 1e3):
        grads = jax.tree.map(
            lambda p, scale=scale: scale * jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params
        )
        updates, state = update(grads, state, params)
        for i in range(3):
            grad = jax.tree.map(lambda g, i=i: g[i], grads["layers"])
            single, single_states[i] = update(grad, single_states[i], singles[i])
            got = jax.tree.map(lambda x, i=i: x[i], (updates["layers"], state.moments["layers"]))
            jax.tree.map(np.testing.assert_array_equal, got, (single, single_states[i].moments))


def test_stacked_none_takes_every_leaf_as_one_tensor() -> None:
    params = {"layers": jnp.zeros((2, 3000))}
    assert isinstance(adamw_8bit(1e-3).init(params).moments["layers"], Moments32)
    moments = adamw_8bit(1e-3, stacked=None).init(params).moments["layers"]
    assert moments.m_codes.shape == (6000,)
    assert moments.m_absmax.shape == (24,)


def test_update_needs_the_parameters() -> None:
    params = {"a": jnp.zeros(3)}
    ours = adamw_8bit(1e-3)
    with pytest.raises(ValueError, match="needs the parameters"):
        ours.update(params, ours.init(params))


def test_step_compiles_once_in_place_and_state_is_small() -> None:
    rng = np.random.default_rng(3)
    params = random_tree(rng, {"layers": dict.fromkeys("abcd", (2, 16, 512))})
    size = sum(p.size for p in jax.tree.leaves(params))
    ours = adamw_8bit(make_schedule(TrainConfig(warmup_steps=2), 10), **HYPER)
    state = ours.init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == size * (2 + 2 * 4 / 256) + 4

    def apply(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(apply, donate_argnums=(0, 1))
    grads = random_tree(rng, {"layers": dict.fromkeys("abcd", (2, 16, 512))})
    memory = step.lower(params, state, grads).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves((params, state)))
    # XLA's CPU backend works on all leaves at once: at most four float32 arrays for each.
    assert memory.temp_size_in_bytes <= 17 * size
    for _ in range(3):
        params, state = step(params, state, grads)
    assert step._cache_size() == 1
    assert int(state.step) == 3


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_state_survives_a_checkpoint(optim: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    params = random_tree(rng, {"layers": {"large": (2, 50, 100), "small": (2, 5, 7)}})
    ours = make_optimizer(TrainConfig(optim=optim), 10)
    _, state = ours.update(params, ours.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(ours.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 20), (3, 20), (20, 20), (30, 20), (100, 5000)])
def test_schedule_equals_transformers(kind: Any, warmup: int, total: int) -> None:
    peak = 2e-4
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    expected = [scheduler.lr_lambdas[0](n) * peak for n in range(total)]
    config = TrainConfig(learning_rate=peak, lr_scheduler_type=kind, warmup_steps=warmup)
    schedule = make_schedule(config, total)
    ours = jax.jit(jax.vmap(schedule))(jnp.arange(total))
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-12)
    assert schedule(0) == (0.0 if warmup else np.float32(peak))
    assert schedule(total + 5) == (0.0 if kind != "constant" and warmup < total else schedule(total + 5))


def test_first_update_uses_the_schedule_at_zero() -> None:
    params = {"a": jnp.ones(3)}
    for optim in ("adamw", "adamw_8bit"):
        config = TrainConfig(optim=optim, learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=4)  # type: ignore[arg-type]
        ours = make_optimizer(config, 10)
        state = ours.init(params)
        for n in range(3):
            updates, state = ours.update(params, state, params)
            # The gradient is constant, so that Adam's direction is one.
            np.testing.assert_allclose(updates["a"], -n / 4 * np.ones(3), rtol=2e-5, atol=1e-7)


def test_configuration_reaches_the_optimizer() -> None:
    base = TrainConfig(lr_scheduler_type="constant", learning_rate=0.5)
    params, grads = {"a": jnp.full(3, 2.0)}, {"a": jnp.full(3, 0.25)}
    for optim in ("adamw", "adamw_8bit"):
        config = dataclasses.replace(
            base, optim=optim, weight_decay=0.1, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.5
        )
        ours = make_optimizer(config, 10)
        state = ours.init(params)
        m = v = 0.0
        for n in (1, 2):
            g = 0.25 * n
            m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
            updates, state = ours.update(jax.tree.map(lambda x, n=n: x * n, grads), state, params)
            direction = m / (1 - 0.5**n) / (np.sqrt(v / (1 - 0.75**n)) + 0.5)
            np.testing.assert_allclose(updates["a"], np.full(3, -0.5 * (direction + 0.1 * 2.0)), rtol=2e-6)
