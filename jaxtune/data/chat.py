"""Records to token ids, and which of them are learnt: the tokenizer's own chat template and special tokens decide."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int, Int32
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune.config import DataConfig
from jaxtune.data.sources import Form
from jaxtune.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Span = tuple[int, int]

ROLES = ("system", "developer", "user", "assistant", "tool")
CHUNK = 1000  # records tokenised in one call
PROBE = "jaxtune-end-of-turn-probe"


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One record. learnt[i] says that token i is a target of the loss; never token 0, which nothing precedes."""

    tokens: Int32[np.ndarray, " n"]
    learnt: Bool[np.ndarray, " n"]


def encode(
    records: datasets.Dataset, form: Form, tokenizer: PreTrainedTokenizerBase, config: DataConfig, name: str
) -> Iterator[Document]:
    """One document per record, in order; lengths are not limited here, and the tokenizer is left as it is.

    instruction and messages: the tokenizer's chat template renders the conversation, which is tokenised once. With
    `train_on: responses` the learnt tokens are each assistant turn's content and end-of-turn marker: a template's
    {% generation %} blocks where it has them, otherwise found by rendering.
    text: the tokenizer's own special tokens, and an end-of-sequence token if it has one; all is learnt.

    Raises:
        UserError: a bad record (name and 1-based number are given), or a tokenizer that cannot serve this form.
    """
    columns = {
        "instruction": ("instruction", "input", "output"),
        "messages": ("messages",),
        "text": (config.text_field,),
    }
    records = records.select_columns([column for column in columns[form] if column in records.column_names])
    template = None if form == "text" else _Template(tokenizer, config.train_on == "responses")
    for start in range(0, len(records), CHUNK):
        chunk = records.select(range(start, min(start + CHUNK, len(records)))).to_list()
        places = [f"{name}, record {number}" for number in range(start + 1, start + 1 + len(chunk))]
        if template is None:
            texts = [_string(record, config.text_field, at) for record, at in zip(chunk, places)]
            yield from _encode_texts(texts, tokenizer)
        else:
            read = _instruction if form == "instruction" else _messages
            rendered = [template.render_spans(read(record, at), at) for record, at in zip(chunk, places)]
            yield from _encode_chats(rendered, tokenizer)


def learnt_tokens(offsets: Int[np.ndarray, "n 2"], spans: Sequence[Span]) -> Bool[np.ndarray, " n"]:
    """Which tokens hold any character of the spans; offsets and spans are [start, end) in characters of one text.

    A token that straddles the edge of a span counts as inside. A tokenizer may trim white space from its offsets, down
    to an empty range; so a token is taken to start no later than where the tokens before it end.
    """
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], ends[:-1]]))
    learnt = np.zeros(len(offsets), bool)
    for start, end in spans:
        learnt |= (starts < end) & (ends > start)
    return learnt


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        tokens = np.array(ids if ids[-1:] == end else ids + end, np.int32)
        yield Document(tokens, np.arange(len(tokens)) > 0)


def _encode_chats(rendered: list[tuple[str, list[Span]]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    # The template has written the special tokens already.
    encoded = tokenizer(
        [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered):
        learnt = learnt_tokens(np.array(offsets, np.int64).reshape(-1, 2), spans)
        learnt[:1] = False
        yield Document(np.array(ids, np.int32), learnt)


class _Template:
    """A tokenizer's chat template: conversations to text, and the characters of it that are learnt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, responses_only: bool) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template, which instruction and messages data need; use the instruct "
                "version of the model, set tokenizer.chat_template, or put whole texts in one column (data.form: text)"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, which chat data need; "
                "load the fast tokenizer (one with a tokenizer.json)"
            )
        self.source = tokenizer.get_chat_template()
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.responses_only = responses_only
        self.has_generation_blocks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None
        self.end_of_turn = self._find_end_of_turn() if responses_only and not self.has_generation_blocks else ""

    def render(self, messages: list[Message], at: str, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the spans of its {% generation %} blocks."""
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=self.has_generation_blocks,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: a template that cannot do without tools
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{at}: the chat template refuses the turns ({roles}): {error}; correct them, or use another template"
            ) from error
        (text,), spans = rendered
        return text, spans[0] if spans else []

    def render_spans(self, messages: list[Message], at: str) -> tuple[str, list[Span]]:
        """The text, and the spans of it that are learnt."""
        text, spans = self.render(messages, at)
        if not self.responses_only:
            return text, [(0, len(text))]
        if self.has_generation_blocks:
            return text, spans
        return text, [
            self._reply(text, messages, i, at) for i, turn in enumerate(messages) if turn["role"] == "assistant"
        ]

    def _reply(self, text: str, messages: list[Message], turn: int, at: str) -> Span:
        """Where the content and the end of one assistant turn stand in the text of the whole conversation."""
        prompt, _ = self.render(messages[:turn], at, add_generation_prompt=True)
        remedy = "set data.train_on to all, or use a chat template with {% generation %} around assistant turns"
        if not text.startswith(prompt):
            raise UserError(
                f"{at}: the chat template renders what precedes turn {turn + 1} in another way once that turn is "
                f"there, so the response cannot be located; {remedy}"
            )
        stop = text.find(self.end_of_turn, len(prompt))
        for content in (messages[turn]["content"], messages[turn]["content"].strip()):
            start = stop - len(content)
            if start >= len(prompt) and text[start:stop] == content:
                return start, stop + len(self.end_of_turn)
        raise UserError(
            f"{at}: the chat template does not render turn {turn + 1} as its content followed by "
            f"{self.end_of_turn!r}; remove that marker from the content if it is there; otherwise {remedy}"
        )

    def _find_end_of_turn(self) -> str:
        """What the template writes after an assistant's content, less the white space that follows it."""
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
        text, _ = self.render(probe, "trying the chat template")
        end = text.rpartition(PROBE)[2].rstrip()
        if PROBE not in text or not end:
            raise UserError(
                "the tokenizer's chat template does not write an assistant's content and then an end-of-turn marker, "
                "so responses would not teach the model to stop; correct the template, or set data.train_on to all"
            )
        return end


def _string(record: dict[str, Any], key: str, at: str) -> str:
    """A field that must be a text with something in it."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{at}: {key} must be a text that is not blank, not {value!r}; correct or remove the record")
    return value


def _instruction(record: dict[str, Any], at: str) -> list[Message]:
    question = _string(record, "instruction", at)
    # Columns of JSON data hold null where a record lacks the key.
    if record.get("input") not in (None, ""):
        question += "\n\n" + _string(record, "input", at)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(record, "output", at)},
    ]


def _messages(record: dict[str, Any], at: str) -> list[Message]:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{at}: messages must be a list of turns with role and content, not {turns!r}")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{at}, turn {number}"
        if not isinstance(turn, dict):
            raise UserError(f"{place}: a turn must have role and content, not be {turn!r}")
        if turn.get("role") not in ROLES:
            raise UserError(f"{place}: role must be one of {', '.join(ROLES)}, not {turn.get('role')!r}; rename it")
        # Ignoring one of these would train on something else than the file says.
        if other := sorted(key for key, value in turn.items() if key not in ("role", "content") and value is not None):
            raise UserError(f"{place}: only role and content are supported, not {', '.join(other)}; remove the keys")
        messages.append({"role": turn["role"], "content": _string(turn, "content", place)})
    return messages
