"""A frozen linear layer with a low-rank adapter: the public function."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Key

from pallas_kernels._dispatch import choose
from pallas_kernels.lora_linear.xla import lora_linear_xla
from pallas_kernels.nf4 import NF4Tensor


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
        implementation: "xla", or None to choose.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"lora_linear: x has width {x.shape[-1]}, the weight [N, K] = {weight.shape} needs {k}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_linear: lora_a and lora_b come together; one of them is None")
    if lora_a is not None and lora_b is not None:
        r = lora_a.shape[0]
        if lora_a.shape != (r, k) or lora_b.shape != (n, r):
            raise ValueError(
                f"lora_linear: lora_a {lora_a.shape} and lora_b {lora_b.shape} must be [R, {k}] and [{n}, R] "
                f"for a weight {weight.shape}"
            )
    choose("lora_linear", implementation, {"xla": lambda: None})
    return lora_linear_xla(x, weight, bias, lora_a, lora_b, dropout_key, scaling, dropout_rate)
