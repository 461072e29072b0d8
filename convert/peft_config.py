"""What an adapter's adapter_config.json may say, checked: it comes from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.json_files import read_json

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
_PROBLEM, _REMEDY = "not a LoRA config", "save the adapter again"

# Keys of rank_pattern and alpha_pattern: regular expressions of a kind that cannot take long.
_MODULES = r"\^?(?:[\w.]|\\\.|\\d\+|\.\*|\[[\w-]+\])+\$?"
# The fields whose other values would make an adapter compute something else than B A x.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
}


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a directory's adapter_config.json; rank_pattern and alpha_pattern are there at least empty.

    Raises:
        ValueError: it is damaged, or rank, factor or patterns are none.
        NotImplementedError: patterns of a kind that is not read.
    """
    path = directory / CONFIG_NAME
    config = read_json(path, _PROBLEM, _REMEDY)
    if type(config.get("r")) is not int or config["r"] < 1:
        raise ValueError(
            f"{path}: {_PROBLEM} (r is {config.get('r')!r}, and must be a whole number above 0); {_REMEDY}"
        )
    if not _is_number(config.get("lora_alpha", 8)):
        raise ValueError(
            f"{path}: {_PROBLEM} (lora_alpha is {config['lora_alpha']!r}, and must be a number); {_REMEDY}"
        )
    if config.get("use_rslora") not in (True, False, None):
        raise ValueError(f"{path}: {_PROBLEM} (use_rslora is {config['use_rslora']!r}, and must be a flag); {_REMEDY}")
    return config | {field: _pattern(path, config, field) for field in ("rank_pattern", "alpha_pattern")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def divisor(config: Mapping[str, Any], rank: int) -> float:
    """What lora_alpha is divided by for the factor on B A."""
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _pattern(path: Path, config: Mapping[str, Any], field: str) -> dict[str, float]:
    """rank_pattern or alpha_pattern, checked: a file from elsewhere must not bring an expression that runs for ever."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict) or not all(_is_number(value) and value > 0 for value in pattern.values()):
        raise ValueError(f"{path}: {field} is no mapping from modules to numbers above 0; save the adapter again")
    for key in pattern:
        if not re.fullmatch(_MODULES, key) or key.count("*") > 2:
            raise NotImplementedError(
                f"{path}: {field} has the key {key[:80]!r}; names of modules are read, with [0-9], \\d+ and up to two "
                "of .* in them"
            )
    return pattern


def of_module(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a pattern states for the module of a tensor: PEFT's keys are regular expressions of how its name ends."""
    module = name.removeprefix(PREFIX).rsplit(".", 2)[0]
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)
