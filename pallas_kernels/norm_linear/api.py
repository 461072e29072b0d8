"""Residual addition, RMSNorm and the adapted linear layers behind it: the public function."""

from __future__ import annotations

from typing import Any

from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Key

from pallas_kernels._dispatch import choose
from pallas_kernels._stack import StackLayer, picked
from pallas_kernels.lora_linear import few_rows, grouped_lora_linear
from pallas_kernels.lora_linear.one_row import normed_low_row, normed_reason
from pallas_kernels.lora_linear.projection import (
    Group,
    check_group,
    exact_reason,
    extended_reason,
    fp8_reason,
    on_their_own,
)
from pallas_kernels.norm_linear.fp8 import norm_linear_fp8
from pallas_kernels.norm_linear.triton import norm_linear_triton
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rms_norm.triton import unsupported_reason

_BLOCKS = {"fp8": norm_linear_fp8, "triton": norm_linear_triton}


def norm_linear(
    x: Float[Array, "*M D"],
    scale: Float[Array, D] | StackLayer,
    group: Group,
    *,
    residual: Float[Array, "*M D"] | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    scaling: float = 1.0,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    name: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*M N"], Float[Array, "*M D"]]:
    """grouped_lora_linear(rms_norm(x + residual)), differentiable in x, residual and the adapters.

    Args:
        x: [..., D]. residual: the same, or None.
        scale: [D], of the norm; it is frozen. eps, unit_offset: as in `rms_norm`.
        group: layers that share the normalised rows (q, k, v; or gate and up).
        scaling, dropout_rate, dropout_key: as in `lora_linear`.
        name: `checkpoint_name` of the result, for rematerialisation policies; the sum is named name_input.
        implementation: "fp8" (which layers marked so take), "few_rows", "triton", "xla", or None to choose.

    Returns:
        [..., sum of N], the layers' results beside each other; and x + residual.

    Raises:
        ValueError: shapes do not fit together, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    d = x.shape[-1]
    check_group("norm_linear", d, group)
    if scale.shape != (d,) or (residual is not None and residual.shape != x.shape):
        shapes = f"x {x.shape}, scale {scale.shape}, residual {None if residual is None else residual.shape}"
        raise ValueError(f"norm_linear: {shapes}; scale must be [{d}] and the residual like x")
    own_scale: Any = picked(scale)
    candidates = {
        "fp8": lambda: fp8_reason(group),
        "few_rows": lambda: few_rows.unsupported_reason(x, group),
        "triton": lambda: unsupported_reason(x, own_scale) or extended_reason(group),
        "xla": lambda: exact_reason(group),
    }
    chosen = choose("norm_linear", implementation, candidates)
    if chosen == "few_rows" and few_rows.reads_stacks(x, group, dropout_key) and normed_reason(d) is None:
        rows, added = x.reshape(-1, d), None if residual is None else residual.reshape(-1, d)
        h, total, low = normed_low_row(rows, added, scale, tuple(group), eps, unit_offset, scaling)
        return few_rows.row_product(h, group, low).reshape(*x.shape[:-1], -1), total.reshape(x.shape)
    if chosen in _BLOCKS:
        rows, added = x.reshape(-1, d), None if residual is None else residual.reshape(-1, d)
        y, total = _BLOCKS[chosen](
            rows, added, own_scale, on_their_own(group), dropout_key, eps, unit_offset, scaling, dropout_rate, name
        )
        return y.reshape(*x.shape[:-1], -1), total.reshape(x.shape)
    total = x if residual is None else x + residual
    h = rms_norm(total, own_scale, eps=eps, unit_offset=unit_offset)
    y = grouped_lora_linear(
        h, group, scaling=scaling, dropout_rate=dropout_rate, dropout_key=dropout_key, implementation=chosen
    )
    if name is not None:
        y, total = checkpoint_name(y, name), checkpoint_name(total, f"{name}_input")
    return y, total
