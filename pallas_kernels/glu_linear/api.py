"""Gated linear unit and the adapted linear layer behind it: the public function."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Key

from pallas_kernels._dispatch import choose
from pallas_kernels.glu import glu
from pallas_kernels.glu.triton import unsupported_reason
from pallas_kernels.glu_linear.fp8 import glu_linear_fp8
from pallas_kernels.glu_linear.triton import glu_linear_triton
from pallas_kernels.lora_linear import few_rows, grouped_lora_linear
from pallas_kernels.lora_linear.one_row import gated_low_row
from pallas_kernels.lora_linear.projection import (
    Projection,
    check_group,
    exact_reason,
    extended_reason,
    fp8_reason,
    on_their_own,
)


def glu_linear(
    gate_up: Float[Array, "*M F2"],
    projection: Projection,
    *,
    activation: str = "silu",
    scaling: float = 1.0,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    name: str | None = None,
    keep_low_rank: bool = True,
    implementation: str | None = None,
) -> Float[Array, "*M N"]:
    """lora_linear(activation(gate) * up), differentiable in gate_up and the adapter.

    Args:
        gate_up: [..., 2F], gate and up beside each other, as `norm_linear` returns them.
        projection: the layer [N, F] behind.
        activation: as in `glu`. scaling, dropout_rate, dropout_key: as in `lora_linear`.
        name: `checkpoint_name` of the result.
        keep_low_rank: for the backward pass; without it, that makes the product again, which is the better way where
            the layer is computed again in it anyway. Through Triton; elsewhere it changes nothing.
        implementation: "fp8" (which a layer marked so takes), "few_rows", "triton", "xla", or None to choose.

    Returns:
        [..., N] in gate_up's dtype.

    Raises:
        ValueError: shapes do not fit together, or an unknown activation or implementation.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"glu_linear: gate_up {gate_up.shape} must hold gate and up of one width beside each other")
    group = (projection,)
    check_group("glu_linear", width // 2, group)
    candidates = {
        "fp8": lambda: fp8_reason(group),
        "few_rows": lambda: few_rows.unsupported_reason(gate_up[..., : width // 2], group),
        "triton": lambda: unsupported_reason(gate_up) or extended_reason(group),
        "xla": lambda: exact_reason(group),
    }
    chosen = choose("glu_linear", implementation, candidates)
    if chosen == "few_rows" and few_rows.reads_stacks(gate_up[..., : width // 2], group, dropout_key):
        h, low = gated_low_row(gate_up.reshape(1, width), group, activation, scaling)
        return few_rows.row_product(h, group, low).reshape(*gate_up.shape[:-1], -1)
    projection = on_their_own(group)[0]
    group = (projection,)
    if chosen in ("fp8", "triton"):
        rows = gate_up.reshape(-1, width)
        arguments = rows, projection, dropout_key, activation, scaling, dropout_rate, name
        y = glu_linear_triton(*arguments, keep_low_rank) if chosen == "triton" else glu_linear_fp8(*arguments)
        return y.reshape(*gate_up.shape[:-1], -1)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    y = grouped_lora_linear(
        glu(gate, up, activation=activation, implementation="xla" if chosen == "xla" else None),
        group,
        scaling=scaling,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=chosen,
    )
    return y if name is None else checkpoint_name(y, name)
