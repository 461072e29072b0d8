"""Linear layers that share their input, as one product with their adapters: the arithmetic of lora_linear, norm_linear
and glu_linear, with no gradient rules of its own.

Three forms. *Separate* (any device): the weights are decoded into one matrix, the adapters' products are rounded and
added to the base's, as PEFT does. *Extended* (Triton's GPUs): the adapter is appended along the contraction, so that
one product `[x, s x A^T] [W, B]^T` sums both in float32 and the addition costs no pass over the output.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._stack import picked
from pallas_kernels.lora_linear.part_key import PartKey
from pallas_kernels.nf4 import NF4Layer, NF4Tensor, dequantize
from pallas_kernels.nf4.triton import decode_into
from pallas_kernels.nf4.triton import unsupported_reason as decode_reason

# The adapters' columns are filled up to whole tiles of a matrix product along its contraction.
_TAIL_MULTIPLE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """One frozen linear layer and its adapter.

    weight: [N, K], dense or NF4 (an NF4Tensor, or an NF4Layer of a stack). bias: [N] or None.
    lora_a: [R, K] and lora_b: [N, R] in any floating dtype, or None; in inference each may be a `StackLayer`. fp8:
    round the base's products to 8 bits, forward and backward (see `fp8_matmul`); the adapter's stay in x's dtype.
    exact_forward: with fp8, the gradient's alone.
    """

    weight: Any
    bias: Any = None
    lora_a: Any = None
    lora_b: Any = None
    fp8: bool = dataclasses.field(default=False, metadata={"static": True})
    exact_forward: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def rank(self) -> int:
        """R, or 0 without an adapter."""
        return 0 if self.lora_a is None else int(self.lora_a.shape[0])

    def gradient(self, lora_a: Any, lora_b: Any) -> Projection:
        """Cotangents of self: of the adapter only, each in its parameter's dtype."""
        if self.lora_a is None or lora_a is None:
            lora_a = lora_b = None
        else:
            lora_a, lora_b = lora_a.astype(self.lora_a.dtype), lora_b.astype(self.lora_b.dtype)
        return dataclasses.replace(self, weight=None, bias=None, lora_a=lora_a, lora_b=lora_b)


Group = Sequence[Projection]


def on_their_own(group: Group) -> tuple[Projection, ...]:
    """The same with adapters that are layers of a stack taken out of it."""
    return tuple(dataclasses.replace(p, lora_a=picked(p.lora_a), lora_b=picked(p.lora_b)) for p in group)


def check_group(op: str, width: int, group: Group) -> None:
    """Raises ValueError where shapes do not fit together; `width` is that of the shared input."""
    if not group:
        raise ValueError(f"{op}: there is no projection to apply")
    for p in group:
        n, k = p.weight.shape
        if isinstance(p.weight, NF4Tensor) and p.weight.stack_shape:
            raise ValueError(
                f"{op}: the weight is a stack {p.weight.stack_shape} of weights; take one, or scan over it"
            )
        if width != k:
            raise ValueError(f"{op}: x has width {width}, the weight [N, K] = {(n, k)} needs {k}")
        if (p.lora_a is None) != (p.lora_b is None):
            raise ValueError(f"{op}: lora_a and lora_b come together; one of them is None")
        if p.lora_a is not None and (p.lora_a.shape != (p.rank, k) or p.lora_b.shape != (n, p.rank)):
            raise ValueError(
                f"{op}: lora_a {p.lora_a.shape} and lora_b {p.lora_b.shape} must be [R, {k}] and [{n}, R] "
                f"for a weight {(n, k)}"
            )


def extended_reason(group: Group) -> str | None:
    """Why the extended form cannot serve this group here, or None."""
    return exact_reason(group) or appended_reason(group)


def appended_reason(group: Group) -> str | None:
    """Why the adapters of this group cannot be appended to its weights here, or None."""
    if all(p.rank == 0 for p in group):
        return "there is no adapter to append"
    for p in group:
        packed = isinstance(p.weight, NF4Tensor | NF4Layer)
        reason = decode_reason(p.weight) if packed else "a dense weight would be copied"
        if reason is not None:
            return reason
    return None


def fp8_reason(group: Group) -> str | None:
    """Why the 8-bit form is not what this group asks for, or None."""
    return None if any(p.fp8 for p in group) else "no layer is marked fp8"


def exact_reason(group: Group) -> str | None:
    """Why forms that round no product to 8 bits are not what this group asks for, or None."""
    return "a layer is marked fp8" if any(p.fp8 for p in group) else None


def tail_width(group: Group, *, extended: bool) -> int:
    """Columns that the adapters take along the contraction: their ranks together, filled up in the extended form."""
    total = sum(p.rank for p in group)
    return -(-total // _TAIL_MULTIPLE) * _TAIL_MULTIPLE if extended else total


def stacked_a(group: Group, tail: int, scaling: float, dtype: Any) -> Array:
    """[tail, K]: all lora_a below each other, times the scaling, filled up with zeros."""
    a = jnp.concatenate([(scaling * p.lora_a).astype(dtype) for p in group if p.rank])
    return jnp.pad(a, ((0, tail - a.shape[0]), (0, 0)))


def block_b(group: Group, tail: int, dtype: Any) -> Array:
    """[sum of N, tail]: the lora_b on a block diagonal."""
    blocks, column = [], 0
    for p in group:
        n = p.weight.shape[0]
        b = jnp.zeros((n, 0), dtype) if p.rank == 0 else p.lora_b.astype(dtype)
        blocks.append(jnp.pad(b, ((0, 0), (column, tail - column - p.rank))))
        column += p.rank
    return jnp.concatenate(blocks)


def decoded(group: Group, x: Array) -> tuple[Array, Array]:
    """All weights as one [sum of N, K] in x's dtype, and x."""
    weights, x = tied(group, x)
    alone = [w.picked() if isinstance(w, NF4Layer) else w for w in weights]
    matrices = [
        jnp.asarray(dequantize(w, x.dtype, "xla")) if isinstance(w, NF4Tensor) else w.astype(x.dtype) for w in alone
    ]
    return matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices), x


def extended_columns(group: Group, tail: int, x: Array) -> tuple[Array, Array]:
    """[W, B]: [sum of N, K + tail] in x's dtype, and x. One array, which decoding and lora_b are written into."""
    weights, x = tied(group, x)
    rows, width = sum(w.shape[0] for w in weights), weights[0].shape[1]
    scratch: Any = None
    row = 0
    for w in weights:
        scratch = decode_into(scratch, w, x.dtype, rows=rows, columns=width + tail, first_row=row)
        row += w.shape[0]
    return lax.dynamic_update_slice(scratch, block_b(group, tail, x.dtype), (0, width)), x


def extended_rows(projection: Projection, a: Array, x: Array) -> tuple[Array, Array]:
    """[W; a]: [N + tail, K] in x's dtype, and x."""
    (w,), x = tied([projection], x)
    n, k = w.shape
    scratch = decode_into(None, w, x.dtype, rows=n + a.shape[0], columns=k)
    return lax.dynamic_update_slice(scratch, a, (n, 0)), x


def tied(group: Group, x: Array) -> tuple[list[Any], Array]:
    """The weights, and x, none of which can be used before the others are there."""
    # Without the tie to x XLA may decode the weights of every layer before the first one runs. Of a weight in its stack
    # the index alone is tied: the stack itself might be copied.
    weights = [p.weight for p in group]
    ties, x = lax.optimization_barrier(([w.index if isinstance(w, NF4Layer) else w for w in weights], x))
    pairs = zip(weights, ties, strict=True)
    return [dataclasses.replace(w, index=t) if isinstance(w, NF4Layer) else t for w, t in pairs], x


def dot(x: Array, w: Array, w_axis: int) -> Array:
    """Contract x's last axis with axis `w_axis` of the matrix w; sums in float32, rounded once to x's dtype."""
    return lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (w_axis,)), ((), ())))


def outer(a: Array, b: Array) -> Array:
    """a^T b in float32: [M, I], [M, J] -> [I, J], where a is the narrow one."""
    contract = (((0,), (0,)), ((), ()))
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def outer_transposed(narrow: Array, wide: Array) -> Array:
    """wide^T narrow in float32: [M, I], [M, J] -> [J, I]."""
    if narrow.dtype == jnp.bfloat16:
        # XLA's CPU code runs no bf16 product that is written transposed (jax 0.10 and 0.11).
        return outer(wide, narrow)
    # The narrow operand first: XLA transposes the first one, and on a CPU that would be the widest array here.
    return outer(narrow, wide).T


def low_rank(x: Array, a: Array, group: Group, key: Array | PartKey | None, rate: float) -> Array:
    """x A^T [M, tail], each member's columns from an input with dropout of its own.

    `x` may be wider than A: columns beyond A's are not read.
    """
    if rate == 0.0 or key is None:
        # Zeros in A instead of a slice of x: a product cannot read part of a row without a copy.
        return dot(x, jnp.pad(a, ((0, 0), (0, x.shape[1] - a.shape[1]))), 1)
    x = x[:, : a.shape[1]]
    rows = [dot(_dropout(x, rate, key, i), a[cut], 1) for i, cut in enumerate(_members(group, a.shape[0]))]
    return jnp.concatenate(rows, axis=1)


def low_rank_backward(
    dt: Array, x: Array, a: Array, group: Group, key: Array | PartKey | None, rate: float
) -> tuple[Array, Array]:
    """Gradients of `low_rank`: dt A [M, K] in x's dtype, and dt^T x [tail, K] in float32."""
    if rate == 0.0 or key is None:
        return dot(dt, a, 0), outer(dt, x)
    dx, d_a = jnp.zeros((), x.dtype), []
    for i, cut in enumerate(_members(group, a.shape[0])):
        dx = dx + _dropout(dot(dt[:, cut], a[cut], 0), rate, key, i)
        d_a.append(outer(dt[:, cut], _dropout(x, rate, key, i)))
    return dx, jnp.concatenate(d_a)


def _members(group: Group, tail: int) -> list[slice]:
    """Which of the tail's columns belong to each member; the last one takes those that fill up."""
    ends = list(itertools.accumulate(p.rank for p in group))
    ends[-1] = tail
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _dropout(x: Array, rate: float, key: Array | PartKey, member: int) -> Array:
    """Inverted dropout. It is its own backward pass, with the same key."""
    if isinstance(key, PartKey):
        keep = key.keep(member, 1.0 - rate)
    else:
        keep = jax.random.bernoulli(jax.random.fold_in(key, member), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def with_bias(y: Array, group: Group) -> Array:
    """y [M, sum of N] plus the biases of those that have one."""
    if all(p.bias is None for p in group):
        return y
    parts = [jnp.zeros(p.weight.shape[0], y.dtype) if p.bias is None else p.bias.astype(y.dtype) for p in group]
    return y + jnp.concatenate(parts)


def split_gradients(group: Group, d_a: Array | None, d_b: Array | None) -> tuple[Projection, ...]:
    """Cuts [tail, K] and [sum of N, tail] into the gradients of each projection's adapter."""
    gradients, row, column = [], 0, 0
    for p in group:
        n, r = p.weight.shape[0], p.rank
        if r == 0 or d_a is None or d_b is None:
            gradients.append(p.gradient(None, None))
        else:
            gradients.append(p.gradient(d_a[column : column + r], d_b[row : row + n, column : column + r]))
        row, column = row + n, column + r
    return tuple(gradients)
