"""The section `data` of a run's configuration: what is learnt, and how it is laid out."""

from __future__ import annotations

import dataclasses
import datetime
import re
import string
from typing import Any, Literal

from jaxtune.config_checks import check_range, check_types
from jaxtune.errors import UserError, shown

# What `train` and `eval` say of records that a program gave and no file holds.
IN_MEMORY = "(in memory)"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learnt, and how it is laid out in batches. docs/data.md explains it with examples.

    train: a source of records: a file (JSON, JSONL, parquet, CSV, TSV, text), a directory saved by `datasets`, or a hub
        id (`name` or `name:subset`). Several as a list, or as a mapping from source to weight: how many times an epoch
        takes its records (0.5: half of them, another half in each epoch).
    eval: a source of held-out records, or a mapping from names of evaluation sets to sources.
    train_split, eval_split: the split within each source; `train[:90%]` is a part of one.
    streaming: take hub datasets as they are read, without a copy on the disk, and no further than a split such as
        `train[:10000]` says.
    tokens_dir: directory for the tokens of sets larger than memory, in a file that goes with the process; None holds
        them in memory.
    eval_fraction: share of the training records to hold out instead; equal records stay together.
    form: instruction (instruction/input/output, "alpaca"), messages (role/content), sharegpt (conversations of
        from/value), completion (prompt/completion), text, tokens (input_ids, labels), or format; auto looks at the
        columns.
    text_field: column of the text form.
    prompt_format, response_format: texts with {column} in them, of which the response is learnt (the format form).
    chat_template: one of the built-in ones by name, or a file of Jinja; None for the tokenizer's own.
    template_variables: what the chat template sees beside the conversation, such as enable_thinking: false.
    template_date: the day that a chat template which asks for today's date is given, as YYYY-MM-DD.
    train_on: responses (the assistant's turns), last_response, or all tokens. A turn's own weight overrides it.
    instruction_part, response_part: learn what stands between a response_part and the next instruction_part, or the
        end, instead of what train_on says.
    never_learn: regular expressions; what they find in a document's text is not learnt.
    on_bad_record: error stops at the first record that cannot be used; skip counts and reports them.
    max_length: tokens per row. packing: several documents in a row, which never attend to each other.
    accept_changed: let a run that is resumed go on with other data, or with other settings of this section; they are
        begun at the start of an epoch.
    overlong: what happens to a document longer than max_length: error, drop, truncate, or split into several.
    shuffle: a new order of documents in each epoch, from train.seed.
    """

    train: str | tuple[str, ...] | dict[str, float]
    eval: str | dict[str, str] | None = None
    train_split: str = "train"
    eval_split: str = "train"
    streaming: bool = False
    tokens_dir: str | None = None
    eval_fraction: float | None = None
    form: Literal["auto", "instruction", "messages", "sharegpt", "completion", "text", "tokens", "format"] = "auto"
    text_field: str = "text"
    prompt_format: str | None = None
    response_format: str | None = None
    chat_template: str | None = None
    template_variables: dict[str, Any] | None = None
    template_date: str = "2024-07-26"
    train_on: Literal["responses", "last_response", "all"] = "responses"
    instruction_part: str | None = None
    response_part: str | None = None
    never_learn: tuple[str, ...] = ()
    on_bad_record: Literal["error", "skip"] = "error"
    max_length: int = 2048
    packing: bool = True
    accept_changed: bool = False
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_types("data", self)
        check_range("data", self, "max_length", lambda x: x >= 8, "8 tokens or more")
        check_range("data", self, "eval_fraction", lambda x: 0 < x < 1, "more than 0 and below 1")
        if not self.sources:
            raise UserError("data.train names no source; name a file, a directory or a hub dataset")
        if isinstance(self.train, tuple) and (twice := [name for name in self.train if self.train.count(name) > 1]):
            raise UserError(f"data.train names {twice[0]} more than once; name it once, with a weight: {twice[0]}: 2")
        for name, weight in self.sources.items():
            if weight <= 0:
                raise UserError(f"data.train.{name} is {weight}; set its weight to more than 0, or remove the source")
        if self.eval == {}:
            raise UserError("data.eval names no set; write name: source, or remove it")
        if "train" in self.eval_sets:
            raise UserError("data.eval has a set named train, which is what the training data are called; rename it")
        if self.eval is not None and self.eval_fraction is not None:
            raise UserError("data.eval and data.eval_fraction both say what is held out; keep one of them")
        for key, text in (("prompt_format", self.prompt_format), ("response_format", self.response_format)):
            try:
                list(string.Formatter().parse(text or ""))
            except ValueError as error:
                raise UserError(
                    f"data.{key} cannot be read: {error}; write {{column}}, and {{{{ for a brace"
                ) from error
        if self.response_format is None and (self.form == "format" or self.prompt_format is not None):
            raise UserError("data.response_format is missing, which says what is learnt; set it, as in '{answer}'")
        if (self.instruction_part is None) != (self.response_part is None):
            raise UserError("data.instruction_part and data.response_part belong together; set both, or neither")
        for pattern in self.never_learn:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(f"data.never_learn has {shown(pattern)}, no regular expression: {error}") from error
        try:
            datetime.date.fromisoformat(self.template_date)
        except ValueError as error:
            raise UserError(f"data.template_date is {self.template_date!r}; write a day as in 2024-07-26") from error

    @property
    def sources(self) -> dict[str, float]:
        """The training sources with their weights."""
        if isinstance(self.train, dict):
            return self.train
        return dict.fromkeys((self.train,) if isinstance(self.train, str) else self.train, 1.0)

    @property
    def eval_sets(self) -> dict[str, str]:
        """The sources of the evaluation sets by their names; a single one is named `eval`."""
        if isinstance(self.eval, dict):
            return self.eval
        return {} if self.eval is None else {"eval": self.eval}

    @property
    def has_eval(self) -> bool:
        """Whether anything is held out."""
        return self.eval is not None or self.eval_fraction is not None
