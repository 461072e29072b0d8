"""Base weights and an adapter as one model's tensors, made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from convert.checkpoint import Checkpoint
from convert.families.table import Slot
from convert.safetensors_io import TensorInfo
from pallas_kernels import nf4
from pallas_kernels.nf4 import NF4Tensor, on_all_cores

Base = Literal["dequantized", "original"]
Values = Callable[[Slot], np.ndarray]
# Elements that a thread sums at a time.
_SLAB = 1 << 18
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


def base_values(
    checkpoint: Checkpoint, base: Base, *, dtype: np.dtype | None = None, double_quant: bool = True
) -> Values:
    """What the base model's tensors are for a merge.

    Args:
        checkpoint: the base model.
        base: "original": the stored weights. "dequantized": the weights that a 4-bit run multiplies with: each linear
            rounded to `dtype`, quantised to NF4 and decoded again. What is stored in 4 bits is decoded in both cases.
        dtype: compute dtype of the run; by default bfloat16.
        double_quant: as the run had it.
    """
    loads = {load.slot: load for load in checkpoint.loads}
    requantise = base == "dequantized" and not checkpoint.is_packed
    dtype = dtype or DTYPES["bf16"]

    def values(slot: Slot) -> np.ndarray:
        weight = checkpoint.stored(loads[slot])
        tensor = np.asarray(nf4.dequantize(weight)) if isinstance(weight, NF4Tensor) else weight
        if slot.rows is not None:
            tensor = tensor[slice(*slot.rows)]
        if requantise and slot.is_linear:
            tensor = np.asarray(nf4.dequantize(nf4.quantize(tensor.astype(dtype), double_quant=double_quant)))
        return tensor

    return values


def merged(
    slots: Iterable[Slot], base: Values, lora: Mapping[str, Any], scaling: float, dtype: np.dtype
) -> tuple[dict[str, TensorInfo], Callable[[str], np.ndarray]]:
    """The tensors of base + scaling * B A, under Hugging Face's names.

    Sums are float32 and rounded once, to `dtype`, a few rows at a time: beside base and result nothing of a tensor's
    size is held.

    Args:
        slots: the model's tensors.
        base: gives a slot's values, in any float dtype.
        lora: the adapter's tree, lora_A [L, R, in] and lora_B [L, out, R]; {} for none.
        scaling: on B A.
        dtype: of every tensor that comes out.

    Returns:
        Each tensor's info, and a function that makes one by name: what `safetensors_io.write_model` and
        `gguf.writer.write_gguf` take. It raises ValueError where a value is beyond `dtype`.
    """
    parts: dict[str, list[Slot]] = {}
    for slot in slots:
        parts.setdefault(slot.name, []).append(slot)

    def read(name: str) -> np.ndarray:
        tensor: np.ndarray | None = None
        for slot in parts[name]:
            values, factors = np.asarray(base(slot)), _factors(slot, lora)
            if factors is None and values.dtype == dtype and slot.rows is None:
                tensor = values
            elif tensor is None:
                tensor = np.empty(slot.stored_shape, dtype)
            _add(tensor if slot.rows is None else tensor[slice(*slot.rows)], slot.name, values, factors, scaling)
        assert tensor is not None, name
        return tensor

    return {name: TensorInfo(dtype, slots[0].stored_shape) for name, slots in parts.items()}, read


def _factors(slot: Slot, lora: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """A [R, in] and B [out, R] of one slot in float32; None where it is not adapted."""
    node = lora
    for key in slot.path[:-1]:
        node = node.get(key, {})
    if not (slot.is_linear and node):
        return None
    lora_a, lora_b = (np.asarray(node[part][slot.layer], np.float32) for part in ("lora_A", "lora_B"))
    return lora_a, lora_b


def _add(
    tensor: np.ndarray, name: str, base: np.ndarray, factors: tuple[np.ndarray, np.ndarray] | None, scaling: float
) -> None:
    """Put base + scaling * B A into `tensor`, which may be `base` itself; ValueError for values beyond its dtype."""
    step = max(_SLAB // base[:1].size, 1)

    def add(start: int) -> None:
        rows = slice(start, start + step)
        if tensor is not base:
            values = base[rows]
            # What is not finite is reported below.
            with np.errstate(over="ignore", invalid="ignore"):
                if factors is not None:
                    lora_a, lora_b = factors
                    values = values.astype(np.float32) + np.float32(scaling) * (lora_b[rows] @ lora_a)
                tensor[rows] = values
        if not np.isfinite(tensor[rows].astype(np.float32, copy=False)).all():
            raise ValueError(
                f"{name}: values beyond {tensor.dtype.name}, or not finite; write the model as bf16 or fp32"
            )

    on_all_cores(add, range(0, len(tensor), step))


def adapter_scaling(config: Mapping[str, Any]) -> float:
    """The factor on B A that an adapter_config.json states."""
    rank, alpha = config["r"], config.get("lora_alpha", 8)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
