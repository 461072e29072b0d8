"""One measured call of an op: its inputs, how it is called, what is true, and the least work it can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._specs import ModelShape
from pallas_kernels.nf4 import NF4Tensor, quantize

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"


def flops(forward: float, both: float) -> Callable[[str], float]:
    """What `Case.flops` is, of these numbers for FORWARD and BOTH."""
    return {FORWARD: forward, BACKWARD: both - forward, BOTH: both}.__getitem__


_NO_PRODUCTS = flops(0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of one op on inputs of one shape.

    op: the op's folder. name: of its spec, and what is special about the case. m: rows or tokens, or None.
    function: the op's public function, with an `implementation` argument. implementations: what that may be.
    make: a random key -> a tuple of inputs. call: (function of the public signature, *inputs) -> results.
    reference: (*inputs) -> results, by the definition, in the inputs' dtypes. truth: the same without rounding, by
        default `reference` of the inputs in float32.
    flops: of the matrix products, by what is timed. wrt: inputs that gradients are checked for.
    timed: FORWARD, BOTH, or BACKWARD where `function` itself is a backward pass.
    in_place: whether results may be written over inputs.
    headline: whether it is measured when no shapes are asked for.
    """

    op: str
    name: str
    m: int | None
    function: Callable[..., Any]
    implementations: tuple[str, ...]
    make: Callable[[Array], tuple[Any, ...]]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    truth: Callable[..., Any] | None = None
    flops: Callable[[str], float] = _NO_PRODUCTS
    wrt: tuple[int, ...] = ()
    timed: tuple[str, ...] = (FORWARD,)
    in_place: bool = False
    headline: bool = True

    def candidates(self) -> dict[str, Callable[..., Any]]:
        """The op's own implementations, as functions of its public signature."""
        return {name: partial(self.function, implementation=name) for name in self.implementations}

    def exact(self, inputs: tuple[Any, ...], cotangent: Any) -> Any:
        """Results and gradients without rounding, as float32 holds them; see `with_gradients`."""
        return with_gradients(self.truth or self.reference, self.wrt)(in_float32(inputs), cotangent)


def with_gradients(f: Callable[..., Any], wrt: tuple[int, ...]) -> Callable[..., Any]:
    """(inputs, cotangent of the result) -> the result of f, and its gradients for the inputs `wrt`."""

    def run(inputs: tuple[Any, ...], cotangent: Any) -> Any:
        def of_chosen(*chosen: Any) -> Any:
            replaced = dict(zip(wrt, chosen, strict=True))
            return f(*(replaced.get(i, x) for i, x in enumerate(inputs)))

        if not wrt:
            return f(*inputs), ()
        y, pullback = jax.vjp(of_chosen, *(inputs[i] for i in wrt))
        return y, pullback(jax.tree.map(lambda g, like: g.astype(like.dtype), cotangent, y))

    return run


def in_float32(tree: Any) -> Any:
    """The tree with its floating arrays as float32; packed weights stay as they are, rounding included."""

    def widened(x: Any) -> Any:
        return x if isinstance(x, NF4Tensor) or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)

    return jax.tree.map(widened, tree, is_leaf=lambda x: isinstance(x, NF4Tensor))


def normal(key: Array, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16) -> Array:
    """Random values of this standard deviation."""
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def packed(key: Array, shape: tuple[int, int]) -> NF4Tensor:
    """A random NF4 weight [out, in] that leaves the size of what it multiplies as it is."""
    return quantize(normal(key, shape, shape[1] ** -0.5))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or of their shapes."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def reduced(shape: ModelShape) -> ModelShape:
    """A model of the same form that an interpreter can run."""
    return dataclasses.replace(shape, hidden=128, mlp=256, layers=2, heads=4, kv_heads=2, head_width=64, vocabulary=500)


def chosen(cases: Iterable[Case], shapes: list[str]) -> Iterator[Case]:
    """Those whose name begins with one of `shapes`, however its dashes are set; without shapes the headline ones."""

    def plain(name: str) -> str:
        return name.lower().replace("-", "").replace("_", "")

    for case in cases:
        if (not shapes and case.headline) or any(plain(case.name).startswith(plain(shape)) for shape in shapes):
            yield case
