"""RMSNorm: the public functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from pallas_kernels._dispatch import choose
from pallas_kernels.rms_norm.triton import rms_norm_backward_triton, rms_norm_forward_triton, unsupported_reason
from pallas_kernels.rms_norm.xla import rms_norm_backward_xla, rms_norm_forward_xla

_FORWARD = {"triton": rms_norm_forward_triton, "xla": rms_norm_forward_xla}
_BACKWARD = {"triton": rms_norm_backward_triton, "xla": rms_norm_backward_xla}


def rms_norm(
    x: Float[Array, "*M D"],
    scale: Float[Array, D],
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*M D"]:
    """Normalise the last axis of `x` to unit root mean square and multiply by `scale`; the result has x's dtype.

    Args:
        x: [..., D], floating. Heads are rows too: [..., N, H] with a scale of [H].
        scale: [D].
        eps: added to the mean square.
        unit_offset: multiply by 1 + scale, as Gemma's checkpoints mean it.
        implementation: "triton", "xla", or None to choose.

    Raises:
        ValueError: widths differ, or the implementation's name is unknown.
        NotImplementedError: the named implementation cannot serve this call; the text says why.
    """
    _check(x, scale)
    rows = x.reshape(-1, x.shape[-1])
    return _rms_norm(rows, scale, eps, unit_offset, _choose(implementation, x, scale)).reshape(x.shape)


def add_rms_norm(
    x: Float[Array, "*M D"],
    residual: Float[Array, "*M D"],
    scale: Float[Array, D],
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"]]:
    """`rms_norm` of x + residual, and that sum, rounded to x's dtype before it is normalised.

    Args, errors: as `rms_norm`; residual has x's shape.
    """
    _check(x, scale)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: x {x.shape} and residual {residual.shape} must have one shape")
    chosen = _choose(implementation, x, scale, residual)
    rows = [v.reshape(-1, x.shape[-1]) for v in (x, residual)]
    y, total = _add_rms_norm(*rows, scale, eps, unit_offset, chosen)
    return y.reshape(x.shape), total.reshape(x.shape)


def rms_norm_forward(
    x: Float[Array, "M D"],
    scale: Float[Array, D],
    *,
    residual: Float[Array, "M D"] | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    tail: int = 0,
    implementation: str | None = None,
) -> tuple[Float[Array, "M D_plus_tail"], Float32[Array, M], Float[Array, "M D"]]:
    """`rms_norm` of x + residual into an array with `tail` more columns; no gradient rule of its own.

    Args:
        x, scale, eps, unit_offset, implementation: as in `rms_norm`.
        residual: added to x, or None.
        tail: columns of zeros behind the normalised ones.

    Returns:
        The normalised rows [M, D + tail], 1 / rms of each row, and x + residual: what `rms_norm_backward` needs.
    """
    _check(x, scale)
    chosen = _choose(implementation, x, scale, *([] if residual is None else [residual]))
    return _FORWARD[chosen](x, scale, residual, eps, unit_offset, tail)


def rms_norm_backward(
    total: Float[Array, "M D"],
    scale: Float[Array, D],
    inverse_rms: Float32[Array, M],
    dy: Float[Array, "M D_or_wider"],
    *,
    extra: Float[Array, "M D"] | None = None,
    d_total: Float[Array, "M D"] | None = None,
    unit_offset: bool = False,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """The gradient of `rms_norm_forward`'s x, and of its residual, in total's dtype.

    Args:
        total, inverse_rms: as `rms_norm_forward` returned them. scale, unit_offset: as it was given them.
        dy: gradient of the normalised rows; columns beyond D are not read.
        extra: added to dy, or None.
        d_total: gradient of the sum by its other path, added to the result, or None.
    """
    _check(total, scale)
    chosen = _choose(implementation, total, scale, dy, *(g for g in (extra, d_total) if g is not None))
    return _BACKWARD[chosen](total, scale, inverse_rms, dy, extra, d_total, unit_offset)


def _check(x: Array, scale: Array) -> None:
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: scale has shape {scale.shape}, x has width {x.shape[-1]}; they must agree")


def _choose(implementation: str | None, *arrays: Array) -> str:
    return choose("rms_norm", implementation, {"triton": lambda: unsupported_reason(*arrays), "xla": lambda: None})


def _d_scale(total: Array, scale: Array, inverse_rms: Array, dy: Array) -> Array:
    # Compiled away where the scale is frozen.
    normalised = total.astype(jnp.float32) * inverse_rms[:, None]
    return jnp.sum(dy.astype(jnp.float32) * normalised, axis=0).astype(scale.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(x: Array, scale: Array, eps: float, unit_offset: bool, implementation: str) -> Array:
    return _FORWARD[implementation](x, scale, None, eps, unit_offset, 0)[0]


def _rms_norm_fwd(x: Array, scale: Array, eps: float, unit_offset: bool, implementation: str) -> tuple[Array, Any]:
    y, inverse_rms, _ = _FORWARD[implementation](x, scale, None, eps, unit_offset, 0)
    return y, (x, scale, inverse_rms)


def _rms_norm_bwd(
    eps: float, unit_offset: bool, implementation: str, residuals: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array]:
    dx = _BACKWARD[implementation](*residuals, dy, None, None, unit_offset)
    return dx, _d_scale(*residuals, dy)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _add_rms_norm(
    x: Array, residual: Array, scale: Array, eps: float, unit_offset: bool, implementation: str
) -> tuple[Array, Array]:
    return _add_rms_norm_fwd(x, residual, scale, eps, unit_offset, implementation)[0]


def _add_rms_norm_fwd(
    x: Array, residual: Array, scale: Array, eps: float, unit_offset: bool, implementation: str
) -> tuple[tuple[Array, Array], Any]:
    y, inverse_rms, total = _FORWARD[implementation](x, scale, residual, eps, unit_offset, 0)
    # An array without elements remembers the residual's dtype.
    return (y, total), (total, scale, inverse_rms, jnp.zeros((0,), residual.dtype))


def _add_rms_norm_bwd(
    eps: float, unit_offset: bool, implementation: str, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    total, scale, inverse_rms, dtype_holder = residuals
    dy, d_total = cotangents
    dx = _BACKWARD[implementation](total, scale, inverse_rms, dy, None, d_total, unit_offset)
    return dx, dx.astype(dtype_holder.dtype), _d_scale(total, scale, inverse_rms, dy)


_add_rms_norm.defvjp(_add_rms_norm_fwd, _add_rms_norm_bwd)
