"""Records to documents: token ids, each with its weight in the loss."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32, Int

from jaxtune.config import DataConfig
from jaxtune.data.chat import ChatRenderer, WeightedSpan
from jaxtune.data.documents import Document
from jaxtune.data.forms import Chat, Form, Text, Tokens, read_record
from jaxtune.data.sandbox import TemplateLimitError
from jaxtune.data.sources import Records, Unreadable
from jaxtune.data.templates import Span
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Records tokenised in one call: as many as reach either limit.
_CHUNK = 1000
_CHUNK_CHARACTERS = 4_000_000
_EXAMPLES = 3
# The longest text that is tokenised, which takes memory of about 170 bytes a character.
LONGEST = 10_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass
class Tally:
    """What is counted while records are read.

    records: seen. bad: passed over, with the messages of the first few. altered: conversations of which the chat
    template has rewritten or left out some text. date: what a template was given that asked for today's date. overlong,
    unlearnt: the records that were longer than a row, and those of which some or all is left out, as it has nothing to
    learn.
    """

    records: int = 0
    bad: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)
    altered: int = 0
    date: str | None = None
    overlong: list[int] = dataclasses.field(default_factory=list)
    unlearnt: list[int] = dataclasses.field(default_factory=list)


class Encoder:
    """A tokenizer and the settings by which records become documents. The tokenizer is left as it is.

    Conversations are rendered by the chat template, which writes the special tokens, and tokenised once; other texts
    get the tokenizer's own special tokens, and an end-of-sequence token if it has one, which is learnt.

    Raises:
        UserError: a tokenizer that cannot serve.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens stand, which masks need; load the "
                "fast tokenizer (one with a tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.config = config
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._never = [re.compile(pattern, re.DOTALL) for pattern in config.never_learn]
        self._renderer: ChatRenderer | None = None

    def encode(self, records: Records, form: Form, tally: Tally) -> Iterator[Document]:
        """One document per record, in order and of any length; what cannot be used is an error, or counted.

        Raises:
            UserError: a bad record, by file and 1-based number, where `data.on_bad_record` is error; or a chat template
                that cannot serve.
        """
        for chunk in _chunks(self._read(records, form, tally)):
            yield from self._tokenize(chunk)
        if self._renderer is not None and self._renderer.template.asked_date:
            tally.date = self.config.template_date

    def _read(self, records: Records, form: Form, tally: Tally) -> Iterator[_Read]:
        for number, record in enumerate(records, 1):
            tally.records = number
            at = f"{records.name}, record {number}"
            try:
                if isinstance(record, Unreadable):
                    raise UserError(f"{at}: {record.reason}")
                sample = read_record(record, form, self.config, at)
            except UserError as error:
                self._bad(error, tally)
                continue
            # A template that does not serve is no record's fault, and passing over records no remedy.
            if isinstance(sample, Chat) and self._renderer is None:
                self._renderer = ChatRenderer(self.tokenizer, self.config)
            try:
                yield self._spans(sample, number, at, tally)
            except TemplateLimitError:
                raise
            except UserError as error:
                self._bad(error, tally)

    def _bad(self, error: UserError, tally: Tally) -> None:
        if self.config.on_bad_record == "error":
            raise UserError(f"{error} (data.on_bad_record: skip passes over such records)") from error
        tally.bad += 1
        tally.examples += [str(error)][: _EXAMPLES - len(tally.examples)]

    def _spans(self, sample: Chat | Text | Tokens, number: int, at: str, tally: Tally) -> _Read:
        if isinstance(sample, Tokens):
            size = len(self.tokenizer)
            if wrong := [token for token in sample.ids if not 0 <= token < size]:
                raise UserError(f"{at}: input_ids has {wrong[0]}, but the tokenizer's vocabulary has {size} entries")
            return _Read(number, tokens=sample)
        if isinstance(sample, Chat):
            assert self._renderer is not None
            text, spans, altered = self._renderer.render(sample, at)
            tally.altered += altered
        else:
            text = sample.prompt + sample.response
            learnt_from = 0 if self.config.train_on == "all" else len(sample.prompt)
            spans = [(learnt_from, len(text), 1.0)]
        if self.config.response_part is not None and self.config.instruction_part is not None:
            spans = responses_between(text, self.config.instruction_part, self.config.response_part)
        spans += [(*match.span(), 0.0) for pattern in self._never for match in pattern.finditer(text)]
        if len(text) > LONGEST:
            raise UserError(
                f"{at}: it has {len(text):,} characters, and no record may have more than {LONGEST:,}; cut it "
                "into several"
            )
        if _SURROGATE.search(text):
            raise UserError(f"{at}: it holds half of a surrogate pair, which is no character; correct the text")
        return _Read(number, text, spans, special=not isinstance(sample, Chat))

    def _tokenize(self, chunk: list[_Read]) -> Iterator[Document]:
        for (special, are_tokens), group in itertools.groupby(
            chunk, lambda read: (read.special, read.tokens is not None)
        ):
            if are_tokens:
                for read in group:
                    assert read.tokens is not None
                    yield _document(read.tokens.ids, np.array(read.tokens.weights, np.float32), read.number)
            else:
                yield from self._tokenize_texts(list(group), special)

    def _tokenize_texts(self, chunk: list[_Read], special: bool) -> Iterator[Document]:
        if not chunk:
            return
        texts = [read.text for read in chunk]
        encoded = self.tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        for read, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"]):
            places = np.array(offsets, np.int64).reshape(-1, 2)
            weights = np.zeros(len(ids), np.float32)
            for start, stop, weight in read.spans:
                weights[tokens_in(places, (start, stop))] = weight
            if special and ids[-1:] != self._end:
                ids = ids + self._end
                ends = [weight for _, stop, weight in read.spans if stop == len(read.text)]
                weights = np.append(weights, np.float32(ends[-1] if ends else 0.0))[: len(ids)]
            yield _document(ids, weights, read.number)


@dataclasses.dataclass(frozen=True)
class _Read:
    """A record that is ready for the tokenizer, or tokens already. special: whether it adds its special tokens."""

    number: int
    text: str = ""
    spans: Sequence[WeightedSpan] = ()
    special: bool = False
    tokens: Tokens | None = None


def tokens_in(offsets: Int[np.ndarray, "n 2"], span: Span) -> Bool[np.ndarray, " n"]:
    """Which tokens hold any character of a span; offsets and span are [start, stop) in characters of one text.

    A token that straddles the edge of the span counts as inside. A tokenizer may trim white space from its offsets,
    down to an empty range; so a token is taken to start no later than where the tokens before it end.
    """
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], ends[:-1]]))
    return (starts < span[1]) & (ends > span[0])


def responses_between(text: str, instruction_part: str, response_part: str) -> list[WeightedSpan]:
    """What stands between each response_part and the next instruction_part, or the end of the text."""
    spans: list[WeightedSpan] = []
    at = text.find(response_part)
    while at >= 0:
        start = at + len(response_part)
        stop = text.find(instruction_part, start)
        stop = len(text) if stop < 0 else stop
        spans.append((start, stop, 1.0))
        at = text.find(response_part, stop)
    return spans


def _document(ids: Sequence[int], weights: Float32[np.ndarray, " n"], record: int) -> Document:
    weights[:1] = 0.0
    return Document(np.array(ids, np.int32), weights, record)


def _chunks(reads: Iterable[_Read]) -> Iterator[list[_Read]]:
    chunk: list[_Read] = []
    characters = 0
    for read in reads:
        chunk.append(read)
        characters += len(read.text)
        if len(chunk) >= _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
