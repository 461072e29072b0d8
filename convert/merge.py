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
from pallas_kernels.nf4 import NF4Tensor

Base = Literal["dequantized", "original"]
Values = Callable[[Slot], np.ndarray]
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


def base_values(
    checkpoint: Checkpoint, base: Base, *, dtype: np.dtype | None = None, double_quant: bool = True
) -> Values:
    """What the base model's tensors are for a merge, in our orientation.

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
        if slot.transform is not None:
            tensor = slot.transform.to_ours(tensor)
        if requantise and slot.is_linear:
            tensor = np.asarray(nf4.dequantize(nf4.quantize(tensor.astype(dtype), double_quant=double_quant)))
        return tensor

    return values


def merged(
    slots: Iterable[Slot], base: Values, lora: Mapping[str, Any], scaling: float, dtype: np.dtype
) -> tuple[dict[str, TensorInfo], Callable[[str], np.ndarray]]:
    """The tensors of base + scaling * B A, under Hugging Face's names.

    Sums are float32 and rounded once, to `dtype`.

    Args:
        slots: the model's tensors.
        base: gives a slot's values in our orientation, in any float dtype.
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
        tensors = [_sum(slot, base(slot), lora, scaling) for slot in parts[name]]
        tensor = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        with np.errstate(over="ignore"):
            rounded = tensor.astype(dtype, copy=False)
        if not np.isfinite(rounded.astype(np.float32, copy=False)).all():
            raise ValueError(f"{name}: values beyond {dtype.name}, or not finite; write the model as bf16 or fp32")
        return rounded

    return {name: TensorInfo(dtype, slots[0].stored_shape) for name, slots in parts.items()}, read


def _sum(slot: Slot, base: np.ndarray, lora: Mapping[str, Any], scaling: float) -> np.ndarray:
    """One slot's base + scaling * B A, in Hugging Face's form."""
    tensor, node = np.asarray(base), lora
    for key in slot.path[:-1]:
        node = node.get(key, {})
    if slot.is_linear and node:
        lora_a, lora_b = (np.asarray(node[part][slot.layer], np.float32) for part in ("lora_A", "lora_B"))
        tensor = tensor.astype(np.float32) + np.float32(scaling) * (lora_b @ lora_a)
    return tensor if slot.transform is None else slot.transform.to_hf(tensor)


def adapter_scaling(config: Mapping[str, Any]) -> float:
    """The factor on B A that an adapter_config.json states."""
    rank, alpha = config["r"], config.get("lora_alpha", 8)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
