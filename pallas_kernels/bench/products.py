"""Cases of the ops around matrix products: nf4_matmul, lora_linear, norm_linear, glu_linear, attention,
cross_entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels._specs import MODELS, ModelShape
from pallas_kernels.attention import attention
from pallas_kernels.attention.reference import attention_reference, visible
from pallas_kernels.attention.specs import MASKS, Mask
from pallas_kernels.attention.specs import SPECS as ATTENTION_SPECS
from pallas_kernels.bench.case import BOTH, FORWARD, Case, flops, normal, packed, reduced
from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.cross_entropy.reference import linear_cross_entropy_reference
from pallas_kernels.cross_entropy.specs import SPECS as CROSS_ENTROPY_SPECS
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.reference import fp8_matmul_reference
from pallas_kernels.fp8_matmul.specs import ROWS as FP8_ROWS
from pallas_kernels.fp8_matmul.specs import SPECS as FP8_SPECS
from pallas_kernels.glu_linear import glu_linear
from pallas_kernels.glu_linear.reference import glu_linear_reference
from pallas_kernels.glu_linear.specs import SPECS as GLU_LINEAR_SPECS
from pallas_kernels.lora_linear import Projection, lora_linear
from pallas_kernels.lora_linear.reference import projection_reference
from pallas_kernels.lora_linear.specs import RANK, SCALING
from pallas_kernels.lora_linear.specs import ROWS as TRAINING_ROWS
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.reference import nf4_matmul_reference
from pallas_kernels.nf4_matmul.specs import ROWS
from pallas_kernels.nf4_matmul.specs import SPECS as MATMUL_SPECS
from pallas_kernels.norm_linear import norm_linear
from pallas_kernels.norm_linear.reference import norm_linear_reference
from pallas_kernels.norm_linear.specs import SPECS as NORM_LINEAR_SPECS

EPS = 1e-5
BOTH_WAYS = ("triton", "xla")
Adapter = tuple[Array, Array]


def _models(small: bool) -> Iterator[tuple[str, ModelShape]]:
    for name, shape in MODELS.items():
        yield name, reduced(shape) if small else shape


def nf4_matmul_cases(small: bool) -> Iterator[Case]:
    """One decoded token to a batch of training."""
    for name, (n, k) in MATMUL_SPECS.items():
        rows, columns = (min(n, 256), min(k, 256)) if small else (n, k)
        for real_m in ROWS:
            m = min(real_m, 40) if small else real_m

            def make(key: Array, m: int = m, rows: int = rows, columns: int = columns) -> tuple[Any, ...]:
                keys = jax.random.split(key, 2)
                return normal(keys[0], (m, columns)), packed(keys[1], (rows, columns))

            yield Case(
                "nf4_matmul",
                name,
                m,
                nf4_matmul,
                ("mosaic", *BOTH_WAYS),
                make=make,
                call=lambda f, x, w: f(x, w),
                reference=nf4_matmul_reference,
                # What the bytes mean, not rounded to the weight's dtype: implementations round at other places.
                truth=lambda x, w: nf4_matmul_reference(x, dataclasses.replace(w, dtype="float32")),
                flops=flops(2.0 * m * rows * columns, 4.0 * m * rows * columns),
                wrt=(0,),
                headline=name == "llama-3-8b/gate_proj",
            )


def fp8_matmul_cases(small: bool) -> Iterator[Case]:
    """A batch of training; errors are those of e4m3, the definition's own."""
    for name, (n, k) in FP8_SPECS.items():
        m, rows, columns = (40, min(n, 192), min(k, 256)) if small else (FP8_ROWS, n, k)

        def make(key: Array, m: int = m, rows: int = rows, columns: int = columns) -> tuple[Any, ...]:
            keys = jax.random.split(key, 2)
            return normal(keys[0], (m, columns)), packed(keys[1], (rows, columns))

        yield Case(
            "fp8_matmul",
            name,
            m,
            fp8_matmul,
            BOTH_WAYS,
            make=make,
            call=lambda f, x, w: f(x, w),
            reference=fp8_matmul_reference,
            truth=lambda x, w: nf4_matmul_reference(x, dataclasses.replace(w, dtype="float32")),
            flops=flops(2.0 * m * rows * columns, 4.0 * m * rows * columns),
            wrt=(0,),
            timed=(FORWARD, BOTH),
            headline=name == "llama-3-8b/gate_proj",
        )


def _adapter(key: Array, n: int, k: int) -> Adapter:
    keys = jax.random.split(key, 2)
    return normal(keys[0], (RANK, k), k**-0.5, jnp.float32), normal(keys[1], (n, RANK), 0.1, jnp.float32)


def _adapted_flops(m: int, n: int, k: int, members: int = 1) -> Any:
    """Base product twice with its gradient; the adapters' three times, as they have a gradient themselves."""
    base, adapters = 2.0 * m * n * k, 2.0 * m * RANK * (n + members * k)
    return flops(base + adapters, 2 * base + 3 * adapters)


def lora_linear_cases(small: bool) -> Iterator[Case]:
    """One adapted layer of 8,192 tokens."""
    for model, shape in _models(small):
        m = 24 if small else TRAINING_ROWS
        for layer in ("o_proj", "gate_proj"):
            n, k = shape.linears[layer]

            def make(key: Array, m: int = m, n: int = n, k: int = k) -> tuple[Any, ...]:
                keys = jax.random.split(key, 3)
                return normal(keys[0], (m, k)), packed(keys[1], (n, k)), _adapter(keys[2], n, k)

            yield Case(
                "lora_linear",
                f"{model}/{layer}",
                m,
                lora_linear,
                BOTH_WAYS,
                make=make,
                call=lambda f, x, w, adapter: f(x, w, None, *adapter, scaling=SCALING),
                reference=lambda x, w, adapter: projection_reference(x, Projection(w, None, *adapter), SCALING),
                flops=_adapted_flops(m, n, k),
                wrt=(0, 2),
                timed=(FORWARD, BOTH),
                headline=(model, layer) == ("llama-3-8b", "gate_proj"),
            )


def norm_linear_cases(small: bool) -> Iterator[Case]:
    """Gate and up behind their norm and residual, 8,192 tokens; and norm and base alone, to compare with."""
    for name, (width, outputs) in NORM_LINEAR_SPECS.items():
        m, k, n = (24, 128, 256) if small else (TRAINING_ROWS, width, outputs)
        call_rest: dict[str, Any] = {"eps": EPS, "scaling": SCALING}

        def make(key: Array, m: int = m, n: int = n, k: int = k) -> tuple[Any, ...]:
            keys = jax.random.split(key, 7)
            x, residual, scale = normal(keys[0], (m, k)), normal(keys[1], (m, k)), 1 + normal(keys[2], (k,), 0.1)
            weights = packed(keys[3], (n, k)), packed(keys[4], (n, k))
            return x, residual, scale, weights, (_adapter(keys[5], n, k), _adapter(keys[6], n, k))

        def call(
            f: Any, x: Array, residual: Array, scale: Array, weights: Any, adapters: Any, rest: Any = call_rest
        ) -> Any:
            group = [Projection(w, None, *adapter) for w, adapter in zip(weights, adapters, strict=True)]
            return f(x, scale, group, residual=residual, **rest)

        def reference(x: Array, residual: Array, scale: Array, weights: Any, adapters: Any) -> Any:
            group = [Projection(w, None, *adapter) for w, adapter in zip(weights, adapters, strict=True)]
            return norm_linear_reference(x, scale, group, residual, eps=EPS, scaling=SCALING)

        def make_dense(key: Array, m: int = m, n: int = n, k: int = k) -> tuple[Any, ...]:
            keys = jax.random.split(key, 4)
            x, residual = normal(keys[0], (m, k)), normal(keys[1], (m, k))
            return x, residual, 1 + normal(keys[2], (k,), 0.1), normal(keys[3], (2 * n, k), k**-0.5)

        def dense_reference(x: Array, residual: Array, scale: Array, weight: Array) -> Any:
            return norm_linear_reference(x, scale, [Projection(weight)], residual, eps=EPS)

        yield Case(
            "norm_linear",
            name,
            m,
            norm_linear,
            BOTH_WAYS,
            make=make,
            call=call,
            reference=reference,
            flops=_adapted_flops(m, 2 * n, k, members=2),
            wrt=(0, 1, 4),
            timed=(FORWARD, BOTH),
            headline=name.startswith("llama-3-8b"),
        )
        yield Case(
            "norm_linear",
            f"{name}, dense without adapters",
            m,
            norm_linear,
            ("xla",),
            make=make_dense,
            call=lambda f, x, residual, scale, w: f(x, scale, [Projection(w)], residual=residual, eps=EPS),
            reference=dense_reference,
            flops=flops(4.0 * m * n * k, 8.0 * m * n * k),
            wrt=(0, 1),
            timed=(FORWARD, BOTH),
            headline=name.startswith("llama-3-8b"),
        )


def glu_linear_cases(small: bool) -> Iterator[Case]:
    """The gated unit and the layer behind it, 8,192 tokens."""
    for name, (outputs, width) in GLU_LINEAR_SPECS.items():
        m, n, k = (24, 128, 256) if small else (TRAINING_ROWS, outputs, width)

        def make(key: Array, m: int = m, n: int = n, k: int = k) -> tuple[Any, ...]:
            keys = jax.random.split(key, 3)
            return normal(keys[0], (m, 2 * k)), packed(keys[1], (n, k)), _adapter(keys[2], n, k)

        def reference(gate_up: Array, weight: Any, adapter: Adapter) -> Array:
            return glu_linear_reference(gate_up, Projection(weight, None, *adapter), scaling=SCALING)

        yield Case(
            "glu_linear",
            name,
            m,
            glu_linear,
            BOTH_WAYS,
            make=make,
            call=lambda f, x, w, adapter: f(x, Projection(w, None, *adapter), scaling=SCALING),
            reference=reference,
            flops=_adapted_flops(m, n, k),
            wrt=(0, 2),
            timed=(FORWARD, BOTH),
            # The gradient takes the place of gate_up, which a step has no use for any more.
            in_place=True,
            headline=name.startswith("llama-3-8b"),
        )


def attention_cases(small: bool) -> Iterator[Case]:
    """4 x 2,048 tokens: one document a row, or four of unequal length, with soft-cap or window."""
    for model, sizes in ATTENTION_SPECS.items():
        b, t = (2, 40) if small else (4, 2048)
        heads = (4, 2, 64) if small else sizes
        starts = np.array([0, 1, 3, 4]) * t // 8
        ids = np.searchsorted(starts, np.arange(t), side="right").astype(np.int32)
        for mask in MASKS:
            lengths = np.diff([*starts, t]) if mask.documents else np.array([t])
            window = None if mask.window is None else min(mask.window, t // 4)
            seen = b * sum(sum(min(i + 1, window or t) for i in range(length)) for length in map(int, lengths))
            products = 4.0 * heads[0] * heads[2] * seen

            def make(
                key: Array,
                b: int = b,
                t: int = t,
                heads: tuple[int, int, int] = heads,
                mask: Mask = mask,
                ids: Any = ids,
            ) -> tuple[Any, ...]:
                keys = jax.random.split(key, 3)
                counts = (heads[0], heads[1], heads[1])
                qkv = [normal(k, (b, t, n, heads[2])) for k, n in zip(keys, counts, strict=True)]
                return *qkv, (jnp.broadcast_to(ids, (b, t)) if mask.documents else None)

            def reference(
                q: Array, k: Array, v: Array, segments: Array | None, mask: Mask = mask, window: int | None = window
            ) -> Array:
                index = jnp.arange(q.shape[1])

                @jax.checkpoint
                def one_row(row: tuple[Any, ...]) -> Array:
                    q, k, v, segments = jax.tree.map(lambda x: x[None], row)
                    seen = visible(index, index, segments, segments, window)
                    return attention_reference(q, k, v, seen, q.shape[-1] ** -0.5, mask.cap)[0]

                return lax.map(one_row, (q, k, v, segments))

            yield Case(
                "attention",
                f"{model}/{mask.name}",
                b * t,
                attention,
                ("cudnn", "triton", "mosaic", "xla"),
                make=make,
                call=lambda f, q, k, v, segments, window=window, cap=mask.cap: f(
                    q, k, v, segment_ids=segments, window=window, cap=cap
                ),
                reference=reference,
                flops=flops(products, 3.5 * products),
                wrt=(0, 1, 2),
                timed=(FORWARD, BOTH),
                headline=model == "llama-3-8b",
            )


def cross_entropy_cases(small: bool) -> Iterator[Case]:
    """Head and loss of 4 x 2,048 tokens, all of them learnt, forward and backward."""
    for model, (rows, width) in CROSS_ENTROPY_SPECS.items():
        b, t = (2, 20) if small else (4, 2048)
        v, d = (500, 128) if small else (rows, width)
        products = 2.0 * b * t * d * v

        def make(key: Array, b: int = b, t: int = t, v: int = v, d: int = d) -> tuple[Any, ...]:
            keys = jax.random.split(key, 3)
            hidden, head = (
                normal(keys[0], (b, t, d)),
                normal(keys[1], (v, d), 0.02),
            )
            targets = jax.random.randint(keys[2], (b, t), 0, v)
            return hidden, head, targets, jnp.full((b, t), 1 / (b * t), jnp.float32)

        def reference(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
            pieces = [x.reshape(-1, 1, x.shape[1] // 4, *x.shape[2:]) for x in (hidden, targets, weights)]
            piece = jax.checkpoint(lambda h, y, w: linear_cross_entropy_reference(h, head, y, w))
            return jnp.sum(lax.map(lambda x: piece(*x), tuple(pieces)))

        yield Case(
            "cross_entropy",
            model,
            b * t,
            linear_cross_entropy,
            BOTH_WAYS,
            make=make,
            call=lambda f, *inputs: f(*inputs),
            reference=reference,
            flops=flops(products, 2 * products),
            wrt=(0,),
            timed=(BOTH,),
            headline=model == "llama-3-8b",
        )
