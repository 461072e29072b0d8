"""Norm and MLP in slices of the MLP's width: the public functions."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from pallas_kernels.lora_linear.projection import Projection, check_group, extended_reason
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.rms_norm.triton import unsupported_reason as norm_reason
from pallas_kernels.sliced_mlp.triton import sliced_mlp_triton


def most_slices(x: Array, gate: Projection, up: Projection, down: Projection, wanted: int) -> int:
    """The largest number of equal slices, at most `wanted`, that `sliced_mlp` takes here; 0 where it cannot serve."""
    if unsupported_reason(x, gate, up, down, 1) is not None:
        return 0
    return max(n for n in range(1, wanted + 1) if unsupported_reason(x, gate, up, down, n) is None)


def unsupported_reason(x: Array, gate: Projection, up: Projection, down: Projection, slices: int) -> str | None:
    """Why these layers cannot be computed so here, or None."""
    group = (gate, up, down)
    if (reason := norm_reason(x) or extended_reason(group)) is not None:
        return reason
    width = gate.weight.shape[0]
    for p in group:
        if p.rank == 0 or p.bias is not None:
            return "a layer has no adapter, or a bias"
        assert isinstance(p.weight, NF4Tensor | NF4Layer)
        block = (p.weight.stack if isinstance(p.weight, NF4Layer) else p.weight).block_size
        if width % (slices * block):
            return f"a width of {width} is not {slices} slices of whole blocks of {block}"
    return None


def sliced_mlp(
    x: Float[Array, "*M D"],
    scale: Float[Array, D],
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    slices: int,
    activation: str = "silu",
    eps: float = 1e-6,
    unit_offset: bool = False,
    scaling: float = 1.0,
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"]]:
    """glu_linear(norm_linear(x)), differentiable in x and the adapters, with one slice of the width at a time.

    Args:
        x: [..., D], the residual stream.
        scale: [D], of the norm; it is frozen. eps, unit_offset: as in `rms_norm`.
        gate, up: layers [F, D]. down: [D, F]. Packed as NF4, each with an adapter and without a bias.
        slices: of F, all of the same width; `most_slices` says how many there can be.
        activation: as in `glu`. scaling: as in `lora_linear`.

    Returns:
        [..., D] in x's dtype; and x, through which the gradient of the residual stream comes in.

    Raises:
        ValueError: shapes do not fit together.
        NotImplementedError: these layers cannot be computed so here; the text says why.
    """
    d = x.shape[-1]
    check_group("sliced_mlp", d, (gate, up))
    check_group("sliced_mlp", gate.weight.shape[0], (down,))
    if scale.shape != (d,) or up.weight.shape != gate.weight.shape or down.weight.shape[0] != d:
        shapes = f"scale {scale.shape}, gate {gate.weight.shape}, up {up.weight.shape}, down {down.weight.shape}"
        raise ValueError(f"sliced_mlp: {shapes} must be [D], [F, D], [F, D] and [D, F] for x {x.shape}")
    if (reason := unsupported_reason(x, gate, up, down, slices)) is not None:
        raise NotImplementedError(f"sliced_mlp: it cannot run: {reason}")
    y, total = sliced_mlp_triton(
        x.reshape(-1, d), scale, (gate, up, down), eps, unit_offset, activation, scaling, slices
    )
    return y.reshape(x.shape), total.reshape(x.shape)
