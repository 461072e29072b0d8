"""Tokenizers for scripts that were written for PyTorch, and chat templates by name."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Any

from transformers import BatchEncoding

from jaxtune.api.foreign import ignored, refused, settle
from jaxtune.config import DataConfig
from jaxtune.data.builtin_templates import TEMPLATES, chat_template_source
from jaxtune.data.forms import ROLES
from jaxtune.errors import UserError, shown

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

# Other names of the same templates.
_ALIASES = {
    "llama3": "llama-3",
    "llama31": "llama-3.1",
    "llama-3.2": "llama-3.1",
    "llama-3.3": "llama-3.1",
    "gemma2": "gemma",
    "gemma-2": "gemma",
    "gemma3": "gemma-3",
    "qwen2.5": "qwen-2.5",
    "qwen25": "qwen-2.5",
    "qwen3": "qwen-3",
    "phi-3.5": "phi-3",
}
_GET_CHAT_TEMPLATE = {
    "mapping": refused(
        "conversations of either naming are read as they are; to apply the template yourself, use standardize_sharegpt",
        {"role": "role", "content": "content", "user": "user", "assistant": "assistant"},
    ),
    "map_eos_token": ignored("the tokenizer's end-of-text token stays; generate(eos_token_id=...) names others", True),
    "system_message": refused("put a system message into the conversations"),
}


class Inputs(BatchEncoding):
    """What a tokenizer gives, on the host, from where `generate` takes it to the device."""

    def to(self, *_: Any, **__: Any) -> Inputs:
        """Itself."""
        return self


class _OnHost:
    """A tokenizer that gives NumPy arrays where PyTorch's are asked for."""

    def __call__(self, *texts: Any, return_tensors: Any = None, **settings: Any) -> Any:
        kind = getattr(return_tensors, "value", return_tensors)
        if kind == "pt":
            message = "tokenizer: return_tensors='pt' gives NumPy arrays, which model.generate takes to the device"
            warnings.warn(message, UserWarning, stacklevel=2)
            kind = "np"
        encoding = super().__call__(*texts, return_tensors=kind, **settings)  # type: ignore[misc]
        encoding.__class__ = Inputs
        return encoding

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class has no name that another process could import.
        plain: Any = object.__new__(type(self).__bases__[1])
        plain.__dict__.update(self.__dict__)
        return on_host, (plain,)


def on_host(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, for scripts that ask for PyTorch's tensors and send them to a GPU; else it is as it was."""
    if isinstance(tokenizer, _OnHost):
        return tokenizer
    kind: Any = type(tokenizer)
    made: PreTrainedTokenizerFast = object.__new__(_class_on_host(kind))
    made.__dict__.update(tokenizer.__dict__)
    return made


@functools.cache
def _class_on_host(kind: Any) -> type:
    # The same name, which `save_pretrained` writes.
    return type(kind.__name__, (_OnHost, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def get_chat_template(
    tokenizer: PreTrainedTokenizerFast, chat_template: str = "chatml", **others: Any
) -> PreTrainedTokenizerFast:
    """The tokenizer with another chat template; its tokens stay as they are.

    chat_template: chatml, llama-3, llama-3.1, gemma, gemma-3, mistral, qwen-2.5, qwen-3, phi-3, phi-4, alpaca, vicuna,
        zephyr, or a `.jinja` file.

    Raises:
        UserError: no such template, or one whose special tokens the tokenizer does not have.
    """
    settle("get_chat_template", others, _GET_CHAT_TEMPLATE, ("tokenizer", "chat_template"))
    name = _ALIASES.get(chat_template, chat_template)
    if name not in TEMPLATES and not name.endswith(".jinja"):
        raise UserError(
            f"get_chat_template: chat_template={shown(chat_template)}; it must be a .jinja file or one of "
            f"{', '.join(TEMPLATES)}"
        )
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = chat_template_source(DataConfig(train="-", chat_template=name), tokenizer)
    return changed


def standardize_sharegpt(dataset: datasets.Dataset, **others: Any) -> datasets.Dataset:
    """Conversations with the keys role and content, and the roles that chat templates know, from ShareGPT's.

    Raises:
        UserError: no column conversations, or a turn without a role or with one that is not known.
    """
    foreign = {
        "tokenizer": ignored("the names are the same for all"),
        "batch_size": ignored("the result is the same"),
        "num_proc": ignored("the result is the same"),
        "aliases_for_system": refused("names of roles are fixed", ["system"]),
        "aliases_for_user": refused("names of roles are fixed", ["user", "human", "input"]),
        "aliases_for_assistant": refused("names of roles are fixed", ["gpt", "assistant", "output"]),
    }
    settle("standardize_sharegpt", others, foreign, ("dataset",))
    if "conversations" not in dataset.column_names:
        raise UserError(
            f"standardize_sharegpt: the data has the columns {', '.join(dataset.column_names)}, and no conversations"
        )

    def standard(record: dict[str, Any]) -> dict[str, Any]:
        return {"conversations": [_turn(turn) for turn in record["conversations"]]}

    return dataset.map(standard, desc="Standardise conversations")


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if role not in ROLES or content is None:
        raise UserError(
            f"standardize_sharegpt: a turn is {shown(turn)}; it needs from and value (or role and content), and a role "
            f"among {', '.join(ROLES)}"
        )
    return {"role": ROLES[role], "content": content}
