"""Cases of the ops that are bound by memory: nf4, rms_norm, rope, glu, adam8bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.adam8bit import Moments8bit, adam8bit, quantize_blockwise
from pallas_kernels.adam8bit.reference import adam8bit_reference
from pallas_kernels.adam8bit.specs import SPECS as ADAM_SPECS
from pallas_kernels.bench.case import BACKWARD, Case, normal, packed
from pallas_kernels.glu import glu, glu_backward
from pallas_kernels.glu.reference import glu_reference
from pallas_kernels.glu.specs import SPECS as GLU_SPECS
from pallas_kernels.nf4 import NF4Tensor, dequantize
from pallas_kernels.nf4.reference import nf4_dequantize_reference
from pallas_kernels.nf4.specs import SPECS as NF4_SPECS
from pallas_kernels.rms_norm import rms_norm, rms_norm_backward
from pallas_kernels.rms_norm.reference import rms_norm_reference
from pallas_kernels.rms_norm.specs import SPECS as NORM_SPECS
from pallas_kernels.rope import rope
from pallas_kernels.rope.reference import rope_reference
from pallas_kernels.rope.specs import SPECS as ROPE_SPECS

BOTH_WAYS = ("triton", "xla")
ROWS = 8192
_EPS = 1e-5


def nf4_cases(small: bool) -> Iterator[Case]:
    """Decoding to bfloat16."""
    for name, (n, k) in NF4_SPECS.items():
        shape = (min(n, 192), min(k, 256)) if small else (n, k)

        def make(key: Array, shape: tuple[int, int] = shape) -> tuple[Any, ...]:
            return (packed(key, shape),)

        def unrounded(t: NF4Tensor) -> Array:
            return nf4_dequantize_reference(dataclasses.replace(t, dtype="float32"), "float32")

        yield Case(
            "nf4",
            name,
            None,
            dequantize,
            (*BOTH_WAYS, "mosaic"),
            make=make,
            call=lambda f, t: f(t, jnp.bfloat16),
            reference=lambda t: nf4_dequantize_reference(t, "bfloat16"),
            truth=unrounded,
            headline=name == "llama-3-8b/gate_proj",
        )


def rms_norm_cases(small: bool) -> Iterator[Case]:
    """8,192 rows, forward and backward."""
    for name, width in NORM_SPECS.items():
        m = 24 if small else ROWS
        d = min(width, 256) if small else width
        headline = name == "llama-3-8b"

        def make(key: Array, m: int = m, d: int = d) -> tuple[Any, ...]:
            keys = jax.random.split(key, 2)
            return normal(keys[0], (m, d)), 1 + normal(keys[1], (d,), 0.1)

        def make_backward(key: Array, m: int = m, d: int = d) -> tuple[Any, ...]:
            keys = jax.random.split(key, 3)
            x = normal(keys[0], (m, d))
            inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=1) + _EPS)
            return x, 1 + normal(keys[1], (d,), 0.1), inverse, normal(keys[2], (m, d))

        def backward_reference(x: Array, scale: Array, inverse: Array, dy: Array) -> Array:
            return jax.vjp(lambda x: rms_norm_reference(x, scale, _EPS), x)[1](dy)[0]

        yield Case(
            "rms_norm",
            name,
            m,
            rms_norm,
            BOTH_WAYS,
            make=make,
            call=lambda f, x, scale: f(x, scale, eps=_EPS),
            reference=lambda x, scale: rms_norm_reference(x, scale, _EPS),
            wrt=(0,),
            headline=headline,
        )
        yield Case(
            "rms_norm",
            name,
            m,
            rms_norm_backward,
            BOTH_WAYS,
            make=make_backward,
            call=lambda f, *inputs: f(*inputs),
            reference=backward_reference,
            timed=(BACKWARD,),
            headline=headline,
        )


def rope_cases(small: bool) -> Iterator[Case]:
    """Queries and keys of 4 x 2,048 tokens."""
    for name, (heads, kv_heads, width) in ROPE_SPECS.items():
        b, t = (2, 12) if small else (4, 2048)

        def make(
            key: Array, b: int = b, t: int = t, heads: int = heads, kv_heads: int = kv_heads, width: int = width
        ) -> tuple[Any, ...]:
            keys = jax.random.split(key, 3)
            angles = 3.0 * normal(keys[2], (b, t, width // 2), dtype=jnp.float32)
            q, k = normal(keys[0], (b, t, heads, width)), normal(keys[1], (b, t, kv_heads, width))
            return q, k, jnp.cos(angles), jnp.sin(angles)

        yield Case(
            "rope",
            name,
            b * t,
            rope,
            BOTH_WAYS,
            make=make,
            call=lambda f, *inputs: f(*inputs),
            reference=lambda q, k, cos, sin: (rope_reference(q, cos, sin), rope_reference(k, cos, sin)),
            wrt=(0, 1),
            headline=name == "llama-3-8b",
        )
        # A caller that has no use for queries and keys before they are turned; XLA would copy them.
        yield Case(
            "rope",
            f"{name}, in place",
            b * t,
            rope,
            ("triton",),
            make=make,
            call=lambda f, *inputs: f(*inputs),
            reference=lambda q, k, cos, sin: (rope_reference(q, cos, sin), rope_reference(k, cos, sin)),
            in_place=True,
            headline=name == "llama-3-8b",
        )


def glu_cases(small: bool) -> Iterator[Case]:
    """8,192 rows: forward, and backward with all three results written over the inputs."""
    for name, (width, activation) in GLU_SPECS.items():
        shape = (24, min(width, 640)) if small else (ROWS, width)
        headline = name.startswith("llama-3-8b/")

        def make(key: Array, shape: tuple[int, int] = shape) -> tuple[Any, ...]:
            return tuple(normal(k, shape) for k in jax.random.split(key, 2))

        def make_backward(key: Array, shape: tuple[int, int] = shape) -> tuple[Any, ...]:
            dh, *operands = (normal(k, shape) for k in jax.random.split(key, 3))
            return dh, tuple(operands)

        def backward_reference(dh: Array, operands: tuple[Array, Array], activation: str = activation) -> Any:
            h, pullback = jax.vjp(lambda gate, up: glu_reference(gate, up, activation), *operands)
            return h, pullback(dh)

        yield Case(
            "glu",
            name,
            shape[0],
            glu,
            BOTH_WAYS,
            make=make,
            call=lambda f, gate, up, activation=activation: f(gate, up, activation=activation),
            reference=lambda gate, up, activation=activation: glu_reference(gate, up, activation),
            wrt=(0, 1),
            headline=headline,
        )
        yield Case(
            "glu",
            name,
            shape[0],
            glu_backward,
            BOTH_WAYS,
            make=make_backward,
            call=lambda f, dh, operands, activation=activation: f(dh, operands, activation=activation),
            reference=backward_reference,
            timed=(BACKWARD,),
            in_place=True,
            headline=headline,
        )


def adam8bit_cases(small: bool) -> Iterator[Case]:
    """One update of an adapter of rank 64 on all linear layers, float32."""
    hyper = {"learning_rate": 1e-3, "weight_decay": 0.01}
    for name, (layers, per_layer) in ADAM_SPECS.items():
        shape = (2, 1000) if small else (layers, per_layer)

        def make(key: Array, shape: tuple[int, int] = shape) -> tuple[Any, ...]:
            keys = jax.random.split(key, 4)
            grad, m, root_v, param = (normal(k, shape, s, jnp.float32) for k, s in zip(keys, (1.0, 0.3, 1.0, 0.02)))
            first = quantize_blockwise(m, signed=True)
            # The parameters first: what is written over the inputs takes the first of a shape, which is theirs.
            return param, Moments8bit(*first, *quantize_blockwise(jnp.square(root_v), signed=False)), grad

        def reference(param: Array, moments: Moments8bit, grad: Array) -> Any:
            update, after = adam8bit_reference(
                grad, moments, param, jnp.int32(3), hyper["learning_rate"], 0.9, 0.999, 1e-8, hyper["weight_decay"], 256
            )
            return param + update, after

        yield Case(
            "adam8bit",
            name,
            shape[0] * shape[1],
            adam8bit,
            BOTH_WAYS,
            make=make,
            call=lambda f, param, moments, grad: f(grad, moments, param, step=jnp.int32(3), apply=True, **hyper),
            reference=reference,
            in_place=True,
            headline=name == "llama-3-8b",
        )
