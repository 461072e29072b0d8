"""RMSNorm: the public function."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from pallas_kernels._dispatch import choose
from pallas_kernels.rms_norm.xla import rms_norm_xla


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
        x: [..., D], floating.
        scale: [D].
        eps: added to the mean square.
        unit_offset: multiply by 1 + scale, as Gemma's checkpoints mean it.
        implementation: "xla", or None to choose.

    Raises:
        ValueError: widths differ, or the implementation's name is unknown.
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: scale has shape {scale.shape}, x has width {x.shape[-1]}; they must agree")
    choose("rms_norm", implementation, {"xla": lambda: None})
    return rms_norm_xla(x, scale, eps, unit_offset)
