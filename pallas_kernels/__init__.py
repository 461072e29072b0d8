"""GPU ops for 4-bit fine-tuning, usable alone: NumPy and JAX only.

Each op is a package, and most are named like their function: `pallas_kernels.rms_norm` is the function here, as in
`from pallas_kernels import rms_norm`, and what stands beside it is imported from the package, as in
`from pallas_kernels.rms_norm import rms_norm_backward`. All are imported at once, because a package that is imported
later would take its function's name. `python -m pallas_kernels.bench` checks and times them.
"""

from pallas_kernels._stack import StackLayer
from pallas_kernels.adam8bit import Moments8bit, adam8bit, adam8bit_init
from pallas_kernels.attention import attention, cached_attention
from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.glu import glu
from pallas_kernels.glu_linear import glu_linear
from pallas_kernels.lora_linear import Projection, grouped_lora_linear, lora_linear
from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4 import dequantize as nf4_dequantize
from pallas_kernels.nf4 import dequantize_into as nf4_dequantize_into
from pallas_kernels.nf4 import quantize as nf4_quantize
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.norm_linear import norm_linear
from pallas_kernels.rms_norm import add_rms_norm, rms_norm
from pallas_kernels.rope import rope, split_rope

__all__ = [
    "Moments8bit",
    "NF4Tensor",
    "Projection",
    "StackLayer",
    "adam8bit",
    "adam8bit_init",
    "add_rms_norm",
    "attention",
    "cached_attention",
    "fp8_matmul",
    "glu",
    "glu_linear",
    "grouped_lora_linear",
    "linear_cross_entropy",
    "lora_linear",
    "nf4_dequantize",
    "nf4_dequantize_into",
    "nf4_matmul",
    "nf4_quantize",
    "norm_linear",
    "rms_norm",
    "rope",
    "split_rope",
]
