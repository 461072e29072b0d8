"""Frozen linear layers with low-rank adapters: the public functions."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Key

from pallas_kernels._dispatch import choose
from pallas_kernels.attention.parts import AttentionParts
from pallas_kernels.lora_linear import few_rows
from pallas_kernels.lora_linear.fp8 import lora_linear_fp8
from pallas_kernels.lora_linear.one_row import joined_low_row
from pallas_kernels.lora_linear.projection import (
    Group,
    Projection,
    check_group,
    exact_reason,
    extended_reason,
    fp8_reason,
    on_their_own,
)
from pallas_kernels.lora_linear.triton import lora_linear_triton
from pallas_kernels.lora_linear.xla import lora_linear_xla
from pallas_kernels.nf4 import NF4Tensor

_IMPLEMENTATIONS = {
    "fp8": lora_linear_fp8,
    "few_rows": few_rows.lora_linear_few_rows,
    "triton": lora_linear_triton,
    "xla": lora_linear_xla,
}


def lora_linear(
    x: Float[Array, "*M K"],
    weight: Float[Array, "N K"] | NF4Tensor,
    bias: Float[Array, N] | None = None,
    lora_a: Float[Array, "R K"] | None = None,
    lora_b: Float[Array, "N R"] | None = None,
    *,
    scaling: float = 1.0,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*M N"]:
    """x W^T + bias + scaling * (dropout(x) A^T) B^T, differentiable in x, A and B; the base is frozen.

    Args:
        x: [..., K], the dtype that products are computed in (accumulation is float32).
        weight: [N, K] dense, or the same packed as NF4. No gradient is made for it or for the bias.
        bias: [N], or None.
        lora_a: [R, K], lora_b: [N, R], in any floating dtype (cast to x's for the products); both or neither.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        dropout_rate: probability that an element of the adapter's input is dropped; needs `dropout_key` to take effect.
        implementation: "few_rows", "triton", "xla", or None to choose.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes do not fit together, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    return grouped_lora_linear(
        x,
        [Projection(weight, bias, lora_a, lora_b)],
        scaling=scaling,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
    )


def grouped_lora_linear(
    x: Float[Array, "*M K"] | AttentionParts,
    group: Group,
    *,
    scaling: float = 1.0,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*M N"]:
    """`lora_linear` for several layers that share x, as one product.

    Args:
        x: [..., K], or the parts of attention that is.
        group: the layers; each may or may not have an adapter, and each has dropout of its own. Where any is marked
            `fp8`, the implementation "fp8" is the one that serves the group, and takes it.

    Returns:
        [..., sum of N] in x's dtype: the layers' results beside each other, in the group's order.

    Raises:
        As `lora_linear`.
    """
    check_group("lora_linear", x.shape[-1], group)
    candidates = {
        "fp8": lambda: fp8_reason(group),
        "few_rows": lambda: few_rows.unsupported_reason(x, group),
        "triton": lambda: extended_reason(group),
        "xla": lambda: exact_reason(group),
    }
    chosen = choose("lora_linear", implementation, candidates)
    if isinstance(x, AttentionParts):
        if chosen == "few_rows" and few_rows.reads_stacks(x, group, dropout_key):
            whole, low = joined_low_row(x, group, scaling)
            return few_rows.row_product(whole, group, low).reshape(*x.shape[:-1], -1)
        x = x.joined()
    rows = x.reshape(-1, x.shape[-1])
    group = (
        tuple(group)
        if chosen == "few_rows" and few_rows.reads_stacks(rows, group, dropout_key)
        else on_their_own(group)
    )
    y = _IMPLEMENTATIONS[chosen](rows, group, dropout_key, scaling, dropout_rate)
    return y.reshape(*x.shape[:-1], -1)
