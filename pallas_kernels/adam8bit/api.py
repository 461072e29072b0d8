"""AdamW with block-wise 8-bit moments: the public function."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels._dispatch import choose
from pallas_kernels.adam8bit.reference import Moments8bit
from pallas_kernels.adam8bit.triton import adam8bit_triton, unsupported_reason
from pallas_kernels.adam8bit.xla import adam8bit_xla

_IMPLEMENTATIONS = {"triton": adam8bit_triton, "xla": adam8bit_xla}


def adam8bit_init(shape: tuple[int, ...], *, stack_axes: int = 0, block_size: int = 256) -> Moments8bit:
    """Moments of zero for a parameter of this shape; its first `stack_axes` axes count separate tensors."""
    stack, p = shape[:stack_axes], math.prod(shape[stack_axes:])
    codes, scales = (*stack, p), (*stack, -(-p // block_size))
    # Four buffers of their own: one that stood in two places could not be donated.
    m, v = ((jnp.zeros(codes, jnp.uint8), jnp.zeros(scales, jnp.float32)) for _ in range(2))
    return Moments8bit(*m, *v)


def adam8bit(
    grad: Float[Array, "*shape"],
    moments: Moments8bit,
    param: Float[Array, "*shape"],
    *,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""] | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    block_size: int = 256,
    apply: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*shape"], Moments8bit]:
    """One AdamW update from 8-bit moments; what is to be added to the parameter, and the new moments.

    Moments are decoded, updated and used in float32, then encoded again (see `reference`). The update is
    -learning_rate * (m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps) + weight_decay * param), as in bitsandbytes'
    CPU kernel. (Its CUDA kernel decays the parameter after the step instead of before, moves a first moment's code by
    one where its sign would be lost, and passes over gradients that are not finite. Here those spread to their block:
    keep them out.)

    Args:
        grad, param: the same shape, any floating dtype.
        moments: of `adam8bit_init` for that shape, or of the last update.
        step: int32, number of this update, the first being 1.
        learning_rate: of this update.
        b1, b2: decay rates of the moments, in [0, 1). eps: added to the root of the second moment.
        weight_decay: decoupled (arXiv:1711.05101).
        block_size: elements per scale; what the moments were made with.
        apply: return the parameter after the update instead, in its own dtype: one pass less over it.
        implementation: "triton", "xla", or None to choose. Through Triton moments, and parameter or (float32) gradient,
            are overwritten where the compiler can.

    Returns:
        The update, float32 in param's shape, or with `apply` the new parameter; and the moments after it.

    Raises:
        ValueError: shapes do not fit together, or the implementation's name is unknown.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    stack_axes = moments.m_codes.ndim - 1
    stack, p = param.shape[:stack_axes], math.prod(param.shape[stack_axes:])
    codes, scales = (*stack, p), (*stack, -(-p // block_size))
    shapes = tuple(x.shape for x in moments)
    if grad.shape != param.shape or shapes != (codes, scales, codes, scales):
        raise ValueError(
            f"adam8bit: grad {grad.shape}, param {param.shape} and moments {shapes} do not fit together: grad and "
            f"param must agree, and with blocks of {block_size} this param needs codes {codes} and scales {scales}"
        )
    candidates = {"triton": lambda: unsupported_reason(grad, moments, param, block_size), "xla": lambda: None}
    run = _IMPLEMENTATIONS[choose("adam8bit", implementation, candidates)]
    return run(grad, moments, param, step, learning_rate, b1, b2, eps, weight_decay, block_size, apply)
