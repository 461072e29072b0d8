"""Head and cross-entropy by their definition: all logits at once, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.cross_entropy.head import Head, decoded_head
from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4.reference import nf4_dequantize_reference


def linear_cross_entropy_reference(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    cap: float | None = None,
    scale: float = 1.0,
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log softmax(scale * hidden head^T)[target], soft-capped where `cap` is set."""
    if isinstance(head, NF4Tensor):
        head = nf4_dequantize_reference(head, hidden.dtype.name)
    head = decoded_head(head, hidden.dtype)
    logits = scale * jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * weights)
