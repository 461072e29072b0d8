"""What lora_linear, norm_linear and glu_linear are tested with: adapted layers, their float64 truth, the comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._device import compute_capability
from pallas_kernels._triton import interpreted
from pallas_kernels.lora_linear import Projection
from pallas_kernels.nf4 import dequantize, quantize

M, SCALING, EPS = 7, 1.75, 1e-3
KEY = jax.random.key(5)
GROUPS = {
    "one": ((96, 1),),
    "three": ((96, 40), (32, 40), (32, 60)),
    "one without an adapter": ((64, 512), (32, 0)),
}


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """The real ones where there is a GPU, with float32 products that are float32."""
    with jax.default_matmul_precision("highest"), contextlib.nullcontext() if compute_capability() else interpreted():
        yield


def projections(seed: int, k: int, members: tuple[tuple[int, int], ...], bias: bool = False) -> tuple[Projection, ...]:
    rng = np.random.default_rng(seed)
    made = []
    for n, r in members:
        w = quantize(jnp.asarray(0.2 * rng.standard_normal((n, k)), jnp.float32))
        b = jnp.asarray(rng.standard_normal(n), jnp.float32) if bias else None
        a = jnp.asarray(0.3 * rng.standard_normal((r, k)), jnp.float32) if r else None
        bb = jnp.asarray(rng.standard_normal((n, r)), jnp.float32) if r else None
        made.append(Projection(w, b, a, bb))
    return tuple(made)


def true_linear(x: Any, group: tuple[Projection, ...], keep: list[Any] | None = None) -> Any:
    """The definition in float64; `keep` is each member's dropout factor."""
    parts = []
    for i, p in enumerate(group):
        weight = jnp.asarray(dequantize(p.weight, implementation="xla"), jnp.float64)
        y = x @ weight.T + (0 if p.bias is None else p.bias)
        if p.lora_a is not None:
            y = y + SCALING * ((x if keep is None else x * keep[i]) @ p.lora_a.T) @ p.lora_b.T
        parts.append(y)
    return jnp.concatenate(parts, axis=-1)


def keep_factors(count: int, width: int, rate: float) -> list[Any]:
    return [jax.random.bernoulli(jax.random.fold_in(KEY, i), 1 - rate, (M, width)) / (1 - rate) for i in range(count)]


def compare(
    function: Callable[..., Any], truth: Callable[..., Any], arguments: tuple[Any, ...], tolerance: float
) -> None:
    """Values and gradients of `function` beside those of `truth` in float64, each array's error relative to its norm.

    `arguments` are trees. Packed weights and biases are frozen: their gradients are zero.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(arguments)
    leaves = [leaf for _, leaf in paths]
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    frozen = [".weight" in (name := jax.tree_util.keystr(paths[i][0])) or ".bias" in name for i in floats]

    def of(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            full = list(leaves)
            for i, leaf in zip(floats, given, strict=True):
                full[i] = leaf
            return f(*jax.tree.unflatten(structure, full))

        return call

    values, pullback = jax.vjp(of(function), *(leaves[i] for i in floats))
    rng = np.random.default_rng(9)
    cotangent = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape), y.dtype), values)
    with jax.enable_x64(True):
        # Not compiled as one: XLA would leave out the rounding that decoding does.
        expected, true_pullback = jax.vjp(of(truth), *(leaves[i].astype(jnp.float64) for i in floats))
        wanted = true_pullback(jax.tree.map(lambda c: c.astype(jnp.float64), cotangent))
    pairs = list(zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True))
    for is_frozen, ours, true in zip(frozen, pullback(cotangent), wanted, strict=True):
        assert not (is_frozen and np.any(np.asarray(ours)))
        pairs += [] if is_frozen else [(ours, true)]
    for ours, true in pairs:
        difference = np.asarray(ours, np.float64) - np.asarray(true, np.float64)
        assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(np.asarray(true, np.float64))


def bfloat16_errors(
    functions: Mapping[str, Callable[..., Any]], arguments: tuple[Any, ...]
) -> tuple[dict[str, list[float]], list[float]]:
    """Errors of results and gradients of functions of (x..., adapters), in bfloat16 but for the adapters, relative to
    the truth; and those of the last function, the reference, whose float32 form the truth is."""
    low = [jax.tree.map(lambda v: v.astype(jnp.bfloat16), x) for x in arguments[:-1]]

    def results(f: Callable[..., Any], given: list[Any]) -> list[np.ndarray]:
        @jax.jit
        def run(given: list[Any], cotangent: Any) -> Any:
            y, pullback = jax.vjp(f, *given)
            return y, pullback(jax.tree.map(lambda y, like: like.astype(y.dtype), y, cotangent))

        return [np.asarray(v, np.float64) for v in jax.tree.leaves(run(given, cotangent))]

    *_, reference = functions.values()
    exact = [jax.tree.map(lambda v: v.astype(jnp.float32), x) for x in (*low, arguments[-1])]
    rng = np.random.default_rng(9)
    shapes = jax.eval_shape(reference, *exact)
    cotangent = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape), jnp.bfloat16), shapes)
    truth = results(reference, exact)

    def errors(f: Callable[..., Any]) -> list[float]:
        got = results(f, [*low, arguments[-1]])
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, truth, strict=True)]

    every = {name: errors(f) for name, f in functions.items()}
    return every, every.popitem()[1]
