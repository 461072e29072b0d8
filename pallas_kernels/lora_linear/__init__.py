"""A frozen linear layer with a low-rank adapter."""

from pallas_kernels.lora_linear.api import lora_linear

__all__ = ["lora_linear"]
