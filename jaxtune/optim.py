"""Optimizers and learning-rate schedules: AdamW with float32 or block-wise 8-bit moments, as optax transformations.

Gradients are not clipped here: the step does that before, since it reports the norm. Arithmetic is float32 whatever
dtype parameters and gradients have, and updates are float32; `optax.apply_updates` adds them in float32 and rounds once
to the parameter's dtype. With bfloat16 parameters, updates below half a unit in the last place are therefore lost.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float32, Int32

from jaxtune.config import TrainConfig
from pallas_kernels.adam8bit import Moments8bit, adam8bit, adam8bit_init
from pallas_kernels.adam8bit.reference import adam_direction


class Moments32(NamedTuple):
    """Both moments of a small parameter, float32 in its shape."""

    m: Float32[Array, "*shape"]
    v: Float32[Array, "*shape"]


class Adam8bitState(NamedTuple):
    """Plain arrays only, so that it can be donated, sharded and checkpointed.

    step: int32, updates done. moments: the parameters' tree with a Moments8bit or a Moments32 for each of them.
    """

    step: Int32[Array, ""]
    moments: Any


class ApplyingTransformation(optax.GradientTransformationExtraArgs):
    """optax's, whose `update` gives the parameters after it with `apply=True`."""


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    stacked: str | None = "layers",
    min_8bit_size: int = 4096,
    block_size: int = 256,
    implementation: str | None = None,
) -> optax.GradientTransformation:
    """AdamW whose moments are held in 8 bits, 2.03 bytes a parameter, in bitsandbytes' format and with its rules.

    Args:
        learning_rate: a number, or a schedule; update number n, counted from 0, uses schedule(n).
        b1, b2: decay rates of the moments, in [0, 1). eps: added to the root of the second moment.
        weight_decay: decoupled, for every parameter.
        stacked: parameters below this key have one tensor for each index of axis 0: blocks do not cross them, and their
            sizes count singly. None where there is no such key.
        min_8bit_size: tensors of fewer elements keep float32 moments.
        block_size: elements per scale.
        implementation: of `pallas_kernels.adam8bit`, or None to choose.
    """

    def init_one(path: tuple[Any, ...], param: Array) -> Moments8bit | Moments32:
        stack_axes = int(stacked is not None and stacked in (getattr(entry, "key", None) for entry in path))
        if math.prod(param.shape[stack_axes:]) < min_8bit_size:
            return Moments32(jnp.zeros(param.shape, jnp.float32), jnp.zeros(param.shape, jnp.float32))
        return adam8bit_init(param.shape, stack_axes=stack_axes, block_size=block_size)

    def init(params: optax.Params) -> Adam8bitState:
        return Adam8bitState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(init_one, params))

    def update(
        grads: optax.Updates, state: Adam8bitState, params: optax.Params | None = None, *, apply: bool = False
    ) -> tuple[optax.Updates, Adam8bitState]:
        """`apply`: give the parameters after the update instead of the update."""
        if params is None:
            raise ValueError("adamw_8bit: update needs the parameters; pass them as its third argument")
        step = state.step + 1
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def update_one(grad: Array, moments: Moments8bit | Moments32, param: Array) -> tuple[Array, Any]:
            if isinstance(moments, Moments8bit):
                return adam8bit(
                    grad,
                    moments,
                    param,
                    step=step,
                    learning_rate=rate,
                    b1=b1,
                    b2=b2,
                    eps=eps,
                    weight_decay=weight_decay,
                    block_size=block_size,
                    apply=apply,
                    implementation=implementation,
                )
            g = grad.astype(jnp.float32)
            m = b1 * moments.m + (1 - b1) * g
            v = b2 * moments.v + (1 - b2) * jnp.square(g)
            direction = adam_direction(m, v, step, b1, b2, eps) + weight_decay * param.astype(jnp.float32)
            change = -rate * direction
            return (param + change).astype(param.dtype) if apply else change, Moments32(m, v)

        results = jax.tree.map(update_one, grads, state.moments, params)
        updates = jax.tree.map(lambda _, result: result[0], grads, results)
        moments = jax.tree.map(lambda _, result: result[1], grads, results)
        return updates, Adam8bitState(step, moments)

    return ApplyingTransformation(init, update)


def updated(
    optimizer: optax.GradientTransformation, gradient: optax.Updates, state: Any, params: optax.Params
) -> tuple[optax.Params, Any]:
    """Parameters and optimizer state after one update, without an array for the update itself where possible."""
    if isinstance(optimizer, ApplyingTransformation):
        return optimizer.update(gradient, state, params, apply=True)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """optax's AdamW with float32 moments, 8 bytes a parameter, and float32 arithmetic for parameters of any dtype."""
    inner = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)

    def float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        return inner.update(float32(grads), state, float32(params))

    return optax.GradientTransformation(lambda params: inner.init(float32(params)), update)


def make_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of update n, counted from 0: transformers' `get_scheduler` for the same name, at every update.

    Linear from zero over `warmup_steps` updates, then constant, or to zero at `total_steps` linearly or as half a
    cosine; zero from there on.
    """
    warmup, peak = config.warmup_steps, config.learning_rate

    def schedule(count: Array | int) -> Array:
        n = jnp.asarray(count, jnp.float32)
        left = jnp.clip((total_steps - n) / max(1, total_steps - warmup), 0.0, 1.0)
        # (1 + cos(pi * (1 - left))) / 2 = sin^2(pi * left / 2), which stays exact near the end.
        after = {"constant": jnp.ones(()), "linear": left, "cosine": jnp.square(jnp.sin(jnp.pi / 2 * left))}
        return peak * jnp.where(n < warmup, n / max(1, warmup), after[config.lr_scheduler_type])

    return schedule


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `total_steps` updates, for parameters whose layers are stacked below "layers"."""
    optimizer = {"adamw": adamw, "adamw_8bit": adamw_8bit, "paged_adamw_8bit": adamw_8bit}[config.optim]
    return optimizer(
        make_schedule(config, total_steps),
        config.adam_beta1,
        config.adam_beta2,
        config.adam_epsilon,
        config.weight_decay,
    )
