"""Chat templates by name, for tokenizers that have none, or one that does not serve."""

from __future__ import annotations

import importlib.resources
import pathlib
from typing import TYPE_CHECKING

from jaxtune.config import DataConfig
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokens that each template writes out, which a tokenizer must know as one token each.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama-3.1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "gemma-3": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen-2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen-3": ("<|im_start|>", "<|im_end|>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "phi-4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "alpaca": (),
    "vicuna": (),
    "zephyr": (),
}


def chat_template_source(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja source of the template that `data.chat_template` names, or of the tokenizer's own where it names none.

    Raises:
        UserError: no such template or file, none at all, or one whose special tokens the tokenizer does not have.
    """
    name = config.chat_template
    if name is None:
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template, which conversations need; use the instruct version of the model, "
                f"name one in data.chat_template ({', '.join(TEMPLATES)}, or a .jinja file), or put whole texts in one "
                "column (data.form: text)"
            )
        return str(tokenizer.get_chat_template())
    if name not in TEMPLATES:
        return _read(name)
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in TEMPLATES[name] if token not in vocabulary]:
        raise UserError(
            f"data.chat_template {name} writes {', '.join(missing)}, which this tokenizer does not have as one token: "
            "the model has never seen it. Use the template of the model's own family, or alpaca or vicuna, which are "
            "plain words"
        )
    if not TEMPLATES[name] and tokenizer.eos_token is None:
        raise UserError(f"data.chat_template {name} ends turns with the eos token, which this tokenizer has not")
    return builtin_template(name)


def builtin_template(name: str) -> str:
    """The Jinja source of one of `TEMPLATES`."""
    return (importlib.resources.files(__package__) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _read(name: str) -> str:
    path = pathlib.Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.chat_template {name!r} is neither a file that can be read ({error}) nor one of "
            f"{', '.join(TEMPLATES)}; correct it"
        ) from error
