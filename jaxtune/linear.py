"""The seam: every linear layer of a model passes through here, dense or NF4, with or without an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jaxtyping import Float

from jaxtune.parts import ROW_PARALLEL, Parts
from pallas_kernels.attention import AttentionParts
from pallas_kernels.glu_linear import glu_linear
from pallas_kernels.lora_linear import Projection, grouped_lora_linear
from pallas_kernels.norm_linear import norm_linear
from pallas_kernels.sliced_mlp import most_slices, sliced_mlp

Tree = Mapping[str, Any]
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How adapters act: `scaling` on B A, and the dropout `rate` on their input."""

    scaling: float = 1.0
    dropout_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Which linears have their frozen weights multiplied in 8-bit floating point: all but those named.

    names: of linears, such as "down_proj". layers: indices, of whole layers. exact_forward: only gradients are.
    """

    names: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    exact_forward: bool = False


@dataclasses.dataclass(frozen=True)
class Linears:
    """The linear layers of one sub-block of one decoder layer.

    base: {name: {"kernel": [N, K] or NF4Tensor, "bias": [N] if any}}. adapter: {name: {"lora_A": [R, K], "lora_B":
    [N, R]}} of the adapted ones. dropout_key: of this sub-block in this step; None switches dropout off (evaluation).
    parts: how the layers are cut over several devices; None on one. fp8: which of them are computed in 8 bits; None for
    none. again: they are computed again in the backward pass.
    """

    base: Tree
    adapter: Tree
    adaptation: Adaptation
    dropout_key: Array | None
    parts: Parts | None = None
    fp8: Fp8 | None = None
    again: bool = False

    def after_norm(
        self,
        names: Sequence[str],
        x: Float[Array, "*M D"],
        norm: Tree,
        residual: Float[Array, "*M D"] | None = None,
        *,
        eps: float,
        unit_offset: bool = False,
        name: str,
    ) -> tuple[Float[Array, "*M N"], Float[Array, "*M D"]]:
        """The named layers side by side on the normalised x + residual, and that sum; see `norm_linear`."""
        group = [self._projection(each) for each in names]
        options = self._adapters_act(names[0], x.shape)
        if self.parts is not None:
            x, residual = self.parts.entered(x, residual)
        y, total = norm_linear(
            x, norm["scale"], group, residual=residual, eps=eps, unit_offset=unit_offset, name=name, **options
        )
        return y, total if self.parts is None else self.parts.shared(total)

    def after_glu(self, name: str, gate_up: Float[Array, "*M F2"], activation: str) -> Float[Array, "*M N"]:
        """The named layer on the gated unit; see `glu_linear`."""
        options = self._adapters_act(name, (*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        y = glu_linear(
            gate_up,
            self._projection(name),
            activation=activation,
            name=name,
            keep_low_rank=not self.again,
            **options,
        )
        return y if self.parts is None else self.parts.left(y)

    def slices(self, x: Array, wanted: int) -> int:
        """In how many slices of its width, at most `wanted`, `in_slices` takes this MLP here; 0 where it cannot."""
        drops = self.dropout_key is not None and self.adaptation.dropout_rate > 0
        if self.parts is not None or self.fp8 is not None or drops:
            return 0
        gate, up, down = (self._projection(name) for name in _MLP)
        return most_slices(x, gate, up, down, wanted)

    def in_slices(
        self,
        x: Float[Array, "*M D"],
        norm: Tree,
        activation: str,
        *,
        slices: int,
        eps: float,
        unit_offset: bool = False,
    ) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"]]:
        """The whole MLP on the normalised x, and x; see `sliced_mlp`."""
        return sliced_mlp(
            x,
            norm["scale"],
            *(self._projection(name) for name in _MLP),
            slices=slices,
            activation=activation,
            eps=eps,
            unit_offset=unit_offset,
            scaling=self.adaptation.scaling,
        )

    def apply(self, name: str, x: Float[Array, "*M K"] | AttentionParts) -> Float[Array, "*M N"]:
        """The named layer on x, or on what attention left in parts; over several devices along the tensor axis, one
        whose input is cut."""
        y = grouped_lora_linear(x, [self._projection(name)], **self._adapters_act(name, x.shape))
        return y if self.parts is None else self.parts.left(y)

    def _projection(self, name: str) -> Projection:
        base, adapter = self.base[name], self.adapter.get(name, {})
        bias = base.get("bias")
        if self.parts is not None and name in ROW_PARALLEL:
            bias = self.parts.first_only(bias)
        fp8 = self.fp8 is not None and name not in self.fp8.names
        exact_forward = fp8 and self.fp8 is not None and self.fp8.exact_forward
        return Projection(base["kernel"], bias, adapter.get("lora_A"), adapter.get("lora_B"), fp8, exact_forward)

    def _adapters_act(self, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """How the adapters of a call act; `name` sets its dropout apart from that of other calls. shape: of the
        adapters' input."""
        if self.dropout_key is None:
            return {"scaling": self.adaptation.scaling}
        key: Any = jax.random.fold_in(self.dropout_key, sorted(self.base).index(name))
        if self.parts is not None:
            key = self.parts.dropout_key(key, shape, row_parallel=name in ROW_PARALLEL)
        return {
            "scaling": self.adaptation.scaling,
            "dropout_rate": self.adaptation.dropout_rate,
            "dropout_key": key,
        }


def split_key(key: Array | None, index: Array | int) -> Array | None:
    """A key of its own for each of several parts that share `key`; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)
