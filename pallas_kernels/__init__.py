"""GPU ops for 4-bit fine-tuning, usable alone: NumPy and JAX only.

Each op is a package with a function of the same name, as in `from pallas_kernels.nf4_matmul import nf4_matmul`; here
stand the names that have no package of their own, loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "NF4Tensor": ("pallas_kernels.nf4", "NF4Tensor"),
    "nf4_dequantize": ("pallas_kernels.nf4", "dequantize"),
    "nf4_quantize": ("pallas_kernels.nf4", "quantize"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
