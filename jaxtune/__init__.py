"""Fine-tune Hugging Face language models with QLoRA on one GPU. `python -m jaxtune.train`, or the names below.

Names are found on first use, so that importing takes no time and starts nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.api import (
        FastLanguageModel,
        SFTConfig,
        SFTTrainer,
        TrainingArguments,
        get_chat_template,
        is_bfloat16_supported,
        standardize_sharegpt,
        train_on_responses_only,
    )
    from jaxtune.errors import UserError

__all__ = [
    "FastLanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "UserError",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("jaxtune")
        except PackageNotFoundError:  # used from a clone that is not installed
            return "unknown"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module = "jaxtune.errors" if name == "UserError" else "jaxtune.api"
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
