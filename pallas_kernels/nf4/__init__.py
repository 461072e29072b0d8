"""NF4: 4-bit weights in bitsandbytes' format."""

from pallas_kernels.nf4.api import dequantize, dequantize_into, quantize
from pallas_kernels.nf4.reference import DYNAMIC_MAP, NF4_TABLE
from pallas_kernels.nf4.tensor import NF4Layer, NF4Tensor
from pallas_kernels.nf4.threads import on_all_cores

__all__ = [
    "DYNAMIC_MAP",
    "NF4_TABLE",
    "NF4Layer",
    "NF4Tensor",
    "dequantize",
    "dequantize_into",
    "on_all_cores",
    "quantize",
]
