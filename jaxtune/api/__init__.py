"""The Python API: names that users of Unsloth, TRL and PEFT know, as thin doors to the engine of `jaxtune.train`."""

from jaxtune.api.arguments import SFTConfig, TrainingArguments
from jaxtune.api.fast_model import FastLanguageModel, is_bfloat16_supported
from jaxtune.api.tokenizer import get_chat_template, standardize_sharegpt
from jaxtune.api.trainer import SFTTrainer, train_on_responses_only

__all__ = [
    "FastLanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_sharegpt",
    "train_on_responses_only",
]
