"""What a config.json may say at all: a file from elsewhere is checked once, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REMEDY = "take the model's own file"
_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000
_WHOLE = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
)
_ABOVE_ZERO = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


def check_sizes(config: Mapping[str, Any], required: tuple[str, ...]) -> None:
    """Raise ValueError unless the config's numbers are such that a model can have, and its objects are objects.

    Args:
        config: config.json's content, with its family's defaults. A key that is absent or null is no error unless it is
            among `required`.
        required: keys of whole numbers above zero.
    """
    if bad := [key for key in required if not _is_whole(config.get(key))]:
        raise ValueError(f"config.json: {', '.join(bad)} must be whole numbers above zero; {_REMEDY}")
    if config["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"config.json: num_hidden_layers is {_shown(config['num_hidden_layers'])}; {_REMEDY}")
    rules = ((_WHOLE, _is_whole, "a whole number above zero"), (_ABOVE_ZERO, _is_above_zero, "a number above zero"))
    rope = (("rope_scaling", "rope_parameters"), _is_rope, "an object with a rope_type and numbers")
    objects = (("quantization_config",), lambda value: isinstance(value, dict), "an object")
    kinds = (("layer_types",), _is_words, "a list of words")
    tokens = (("bos_token_id", "eos_token_id", "pad_token_id"), _is_tokens, "a whole number or a list of them")
    for keys, holds, what in (*rules, rope, objects, kinds, tokens):
        for key in keys:
            if config.get(key) is not None and not holds(config[key]):
                raise ValueError(f"config.json: {key} is {_shown(config[key])}, and must be {what}; {_REMEDY}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _is_above_zero(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_tokens(value: Any) -> bool:
    return all(isinstance(part, int) for part in (value if isinstance(value, list) else [value]))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_rope(value: Any) -> bool:
    """One object for all layers, or one for each type of layers."""
    return isinstance(value, dict) and all(part is None or _is_rope_value(key, part) for key, part in value.items())


def _is_rope_value(key: str, value: Any) -> bool:
    if key in ("rope_type", "type"):
        return isinstance(value, str)
    if key.endswith("_attention"):
        return _is_rope(value)
    return isinstance(value, bool) or all(map(_is_number, value if isinstance(value, list) else [value]))
