"""Layers that keep their inputs alone, and a backward pass that computes each of them again.

The backward pass is written out, since what JAX derives from a loop with `jax.checkpoint` leaves two things undone. An
input that comes back from host memory is waited for by its layer, 1.3 ms for 8,192 tokens of an 8B model: here it is
fetched while the layer after it is differentiated. And the gradient of a stack of adapters has their dtype: here each
layer's may be rounded to bfloat16 as soon as it is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True, eq=False)
class Loops:
    """How layers run.

    layer: (shared, x, adapter, index of the layer, its kind) -> x after it; all that it reads of arrays is among these.
    cuts: (start, stop, period) of each loop over a pattern of layers. kinds: of all layers. on_host: inputs wait in
    pinned host memory. unroll: one program for all layers.
    """

    layer: Callable[[Any, Array, Any, Array, Any], Array]
    cuts: Sequence[tuple[int, int, int]]
    kinds: Sequence[Any]
    on_host: bool = False
    unroll: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_inputs(loops: Loops, x: Array, adapters: Any, trained: Any, shared: Any) -> Array:
    """The residual stream [B, T, D] after all layers.

    Args:
        adapters: the layers' adapters, stacked on axis 0.
        trained: None; or a tree of the adapters' shapes in bfloat16, whose values are not read and whose gradient is
            the adapters', which then have none themselves.
        shared: what all layers read; it has no gradient.
    """
    return _forward(loops, x, adapters, trained, shared)[0]


def _forward(loops: Loops, x: Array, adapters: Any, trained: Any, shared: Any) -> tuple[Array, tuple[Any, ...]]:
    kept = []
    for cut in loops.cuts:
        start, _, period = cut

        def body(x: Array, xs: Any, start: int = start, period: int = period) -> tuple[Array, list[Array]]:
            parts, step = xs
            inputs = []
            for place in range(period):
                inputs.append(jax.device_put(x, jax.memory.Space.Host) if loops.on_host else x)
                x = loops.layer(shared, x, parts[place], start + step * period + place, loops.kinds[start + place])
            return x, inputs

        x, inputs = lax.scan(body, x, _steps(adapters, cut), unroll=loops.unroll)
        kept.append(inputs)
    # An empty tuple has no leaves, but tells the backward pass that there was a tree.
    return x, (kept, adapters, None if trained is None else (), shared)


def _backward(loops: Loops, residuals: tuple[Any, ...], dx: Array) -> tuple[Any, ...]:
    kept, adapters, narrow, shared = residuals
    gradients = []
    for cut, inputs in zip(reversed(loops.cuts), reversed(kept), strict=True):
        start, stop, period = cut

        def fetched(step: Array | int, place: int, inputs: list[Array] = inputs) -> Array:
            x = lax.dynamic_index_in_dim(inputs[place], step, keepdims=False)
            return jax.device_put(x, jax.memory.Space.Device) if loops.on_host else x

        def body(
            carry: tuple[Array, Array | None], xs: Any, start: int = start, period: int = period, fetched: Any = fetched
        ) -> tuple[tuple[Array, Array | None], list[Any]]:
            (dx, ahead), (parts, step) = carry, xs
            gradients: list[Any] = [None] * period
            for place in reversed(range(period)):
                if ahead is None:
                    x = fetched(step, place)
                else:
                    x = ahead
                    ahead = fetched(step, place - 1) if place else fetched(jnp.maximum(step - 1, 0), period - 1)
                if loops.unroll:
                    # Or what is computed again would be found to have been computed before.
                    x, dx = lax.optimization_barrier((x, dx))
                index, kind = start + step * period + place, loops.kinds[start + place]

                def again(x: Array, adapter: Any, index: Array = index, kind: Any = kind) -> Array:
                    return loops.layer(shared, x, adapter, index, kind)

                _, pull = jax.vjp(again, x, parts[place])
                dx, gradients[place] = pull(dx)
            if narrow is not None:
                gradients = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients)
            return (dx, ahead), gradients

        last = fetched((stop - start) // period - 1, period - 1) if loops.on_host else None
        (dx, _), of_steps = lax.scan(body, (dx, last), _steps(adapters, cut), reverse=True, unroll=loops.unroll)
        gradients.append(jax.tree.map(_in_order, *of_steps))
    gradient = jax.tree.map(lambda *of_loops: _joined(of_loops[::-1]), *gradients)
    return (dx, gradient, None, None) if narrow is None else (dx, None, gradient, None)


from_inputs.defvjp(_forward, _backward)


def _steps(adapters: Any, cut: tuple[int, int, int]) -> tuple[list[Any], Array]:
    """The adapters of each place in the pattern, and the steps of the loop."""
    start, stop, period = cut
    places = [
        jax.tree.map(lambda leaf, first=first: leaf[first:stop:period], adapters)
        for first in range(start, start + period)
    ]
    return places, jnp.arange((stop - start) // period)


def _in_order(*of_places: Array) -> Array:
    """[steps, ...] of each place to [steps * places, ...]."""
    if len(of_places) == 1:
        return of_places[0]
    return jnp.stack(of_places, axis=1).reshape(-1, *of_places[0].shape[1:])


def _joined(of_loops: tuple[Array, ...]) -> Array:
    return of_loops[0] if len(of_loops) == 1 else jnp.concatenate(of_loops)
