"""The Python API: names that users of Unsloth, TRL and PEFT know, as thin doors to the engine of `jaxtune.train`."""

from jaxtune.api.arguments import SFTConfig, TrainingArguments
from jaxtune.api.model import FastLanguageModel, is_bfloat16_supported
from jaxtune.api.trainer import SFTTrainer, train_on_responses_only

__all__ = [
    "FastLanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "is_bfloat16_supported",
    "train_on_responses_only",
]
