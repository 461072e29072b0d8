"""Frozen linear layers with low-rank adapters."""

from pallas_kernels.lora_linear.api import grouped_lora_linear, lora_linear
from pallas_kernels.lora_linear.part_key import PartKey
from pallas_kernels.lora_linear.projection import Projection

__all__ = ["PartKey", "Projection", "grouped_lora_linear", "lora_linear"]
