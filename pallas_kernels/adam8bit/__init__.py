"""AdamW with block-wise 8-bit moments."""

from pallas_kernels.adam8bit.api import adam8bit, adam8bit_init
from pallas_kernels.adam8bit.reference import Moments8bit, dequantize_blockwise, dynamic_map, quantize_blockwise

__all__ = ["Moments8bit", "adam8bit", "adam8bit_init", "dequantize_blockwise", "dynamic_map", "quantize_blockwise"]
