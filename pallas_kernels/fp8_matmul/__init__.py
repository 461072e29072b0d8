"""Products with a frozen weight in 8-bit floating point (e4m3)."""

from pallas_kernels.fp8_matmul.api import decode_fp8, fp8_matmul, fp8_product, fp8_product_transposed, quantize_rows

__all__ = ["decode_fp8", "fp8_matmul", "fp8_product", "fp8_product_transposed", "quantize_rows"]
