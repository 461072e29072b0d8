"""From the sources of one split to its documents, with an account of what became of every record."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.config import DataConfig
from jaxtune.data.encoding import Document, Encoder, Tally
from jaxtune.data.forms import Form, detect_form
from jaxtune.data.packing import Batch, Documents, RowPlan, lay_out, plan_rows
from jaxtune.data.sources import Record, Records, Unreadable, from_memory, open_records
from jaxtune.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from: their range, how often an epoch takes them, and what was counted on the way."""

    name: str
    form: Form
    start: int
    stop: int
    weight: float
    tally: Tally


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What became of the records.

    records: read. bad: passed over. altered: rewritten by the chat template. truncated, dropped, split: longer than a
    row, by `data.overlong`. unlearnt: documents (or pieces) left out, as they have nothing to learn. duplicates:
    documents that are equal to an earlier one. documents: in the rows. tokens: theirs. learnt_tokens: with weight in
    the loss. rows, fill: how many they fill, and the share of the places there that hold a token, in data order.
    """

    records: int = 0
    bad: int = 0
    altered: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    unlearnt: int = 0
    duplicates: int = 0
    documents: int = 0
    tokens: int = 0
    learnt_tokens: int = 0
    rows: int = 0
    fill: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split. fingerprint: hash of the documents and of what lays them out, not of where they lay."""

    documents: Documents
    sources: tuple[Source, ...]
    statistics: Statistics
    fingerprint: str
    max_length: int
    packing: bool
    shuffle: bool

    @property
    def rows(self) -> RowPlan:
        """The rows in data order, as evaluation takes them; an epoch of training has about as many."""
        return plan_rows(self.documents.lengths, np.arange(len(self.documents)), self.max_length, self.packing)

    @property
    def max_token(self) -> int:
        """The largest token id."""
        return int(self.documents.tokens.max())

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every document once, in order, by field name, each [batch_size, T]; the last batch is filled with padding."""
        plan = self.rows
        for start in range(0, len(plan), batch_size):
            rows = [plan.row(row) for row in range(start, min(start + batch_size, len(plan)))]
            yield lay_out(self.documents, rows + [[]] * (batch_size - len(rows)), self.max_length)


def build(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    *,
    records: datasets.Dataset | datasets.IterableDataset | Sequence[Mapping[str, Any]] | None = None,
    formatting_func: Callable[[Record], str | Record] | None = None,
) -> Dataset:
    """Read, encode and lay out one split: `train`, or an evaluation set by its name in the configuration.

    records: instead of the configuration's sources. formatting_func: makes of each record its text, or a record in any
    of the known forms.

    Raises:
        UserError: see `open_records`, `detect_form` and `Encoder`; also a document that is too long, where
            `data.overlong` is error, and a split with nothing to learn.
    """
    if split == "train" or config.eval_fraction is not None:
        sources, part = config.sources, config.train_split
    elif split in config.eval_sets:
        sources, part = {config.eval_sets[split]: 1.0}, config.eval_split
    elif records is None:
        raise UserError(f"data.eval names no file or dataset for {split}; set it, or ask for no evaluation")
    if records is not None:
        opened = [(from_memory(records), 1.0)]
    else:
        opened = [(open_records(name, part, streaming=config.streaming), weight) for name, weight in sources.items()]
    if formatting_func is not None:
        opened = [(_formatted(source, formatting_func, config), weight) for source, weight in opened]

    encoder, read = Encoder(tokenizer, config), _Read()
    for number, (source, _) in enumerate(opened):
        tally, form = Tally(), detect_form(source.columns, config, source.name)
        read.forms.append(form)
        read.tallies.append(tally)
        for document in encoder.encode(source, form, tally):
            read.documents.append((number, document, digest(document)))
    if config.eval_fraction is not None:
        _hold_out(read, config.eval_fraction, take=split != "train")
    return _finish(read, opened, config)


def eval_sets(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Every evaluation set that the configuration names, by its name; one held out of the training data is `eval`."""
    names = ["eval"] if config.eval_fraction is not None else list(config.eval_sets)
    return {name: build(config, tokenizer, name) for name in names}


@dataclasses.dataclass
class _Read:
    """What the sources gave. documents: with the number of the source and a digest."""

    forms: list[Form] = dataclasses.field(default_factory=list)
    tallies: list[Tally] = dataclasses.field(default_factory=list)
    documents: list[tuple[int, Document, bytes]] = dataclasses.field(default_factory=list)


def _formatted(source: Records, formatting_func: Callable[[Record], str | Record], config: DataConfig) -> Records:
    """The records as a user's function makes them."""

    def iterate() -> Iterator[Record | Unreadable]:
        for number, record in enumerate(source, 1):
            if isinstance(record, Unreadable):
                yield record
                continue
            try:
                made = formatting_func(record)
            except Exception as error:
                error.add_note(f"in formatting_func, given {source.name}, record {number}")
                raise
            if not isinstance(made, str | dict):
                raise UserError(
                    f"{source.name}, record {number}: formatting_func must return a text or a record (a dict), not a "
                    f"{type(made).__name__}; it is given one record at a time"
                )
            yield {config.text_field: made} if isinstance(made, str) else made

    first = next(iterate(), None)
    columns = tuple(first) if isinstance(first, dict) else source.columns
    return Records(source.name, columns, iterate)


def digest(document: Document) -> bytes:
    """What two documents have in common that are equal in tokens and weights."""
    return hashlib.blake2b(document.tokens.tobytes() + document.weights.tobytes(), digest_size=16).digest()


def _hold_out(read: _Read, fraction: float, take: bool) -> None:
    """Keep the held-out part, or the rest. By digest, so that equal records stay together."""
    counts = collections.Counter(found for _, _, found in read.documents)
    wanted, held = max(1, round(fraction * len(read.documents))), set()
    for found in sorted(counts):
        if wanted <= 0:
            break
        held.add(found)
        wanted -= counts[found]
    kept = [item for item in read.documents if (item[2] in held) == take]
    if read.documents and not kept:
        raise UserError(
            f"data.eval_fraction {fraction} of {len(read.documents)} records with {len(counts)} different texts leaves "
            "none to learn; name held-out records in data.eval instead"
        )
    read.documents = kept


def _finish(read: _Read, opened: Sequence[tuple[Records, float]], config: DataConfig) -> Dataset:
    """Bring the documents to the length of a row, leave out those that teach nothing, and account for them all."""
    limit = config.max_length
    overlong = [(number, document) for number, document, _ in read.documents if len(document.tokens) > limit]
    if overlong and config.overlong == "error":
        number, first = overlong[0]
        longest = max(len(document.tokens) for _, document in overlong)
        raise UserError(
            f"{opened[number][0].name}: {len(overlong)} of {len(read.documents)} records are longer than "
            f"data.max_length {limit} (first: record {first.record}; longest: {longest} tokens); raise it, or set "
            "data.overlong to drop, truncate or split"
        )
    learning: list[Document] = []
    sources: list[Source] = []
    for number, (records, weight) in enumerate(opened):
        start, tally = len(learning), read.tallies[number]
        mine = [document for of, document, _ in read.documents if of == number]
        tally.overlong = [document.record for document in mine if len(document.tokens) > limit]
        pieces = [piece for document in mine for piece in _fit(document, config)]
        learning += [piece for piece in pieces if piece.weights.any()]
        tally.unlearnt = [piece.record for piece in pieces if not piece.weights.any()]
        count = len(learning) - start
        if count and round(weight * count) == 0:
            raise UserError(
                f"data.train.{records.name} has {count} documents and the weight {weight:g}, so an epoch would take "
                f"none of them; set the weight to {1 / count:.2g} or more, or remove the source"
            )
        sources.append(Source(records.name, read.forms[number], start, len(learning), weight, tally))
    records_read = sum(tally.records for tally in read.tallies)
    if not learning:
        bad = sum(tally.bad for tally in read.tallies)
        dropped = len(overlong) if config.overlong == "drop" else 0
        hint = "check for assistant turns, or raise data.max_length"
        if config.response_part is not None:
            hint = f"check that data.response_part {config.response_part!r} stands in the texts, letter for letter"
        raise UserError(
            f"{', '.join(source.name for source in sources)}: none of {records_read} records has anything to learn "
            f"({dropped} dropped as longer than data.max_length {limit}, {bad} bad); {hint}"
        )
    documents = Documents(learning)
    plan = plan_rows(documents.lengths, np.arange(len(documents)), limit, config.packing)
    statistics = Statistics(
        records=records_read,
        bad=sum(tally.bad for tally in read.tallies),
        altered=sum(tally.altered for tally in read.tallies),
        **{{"truncate": "truncated", "drop": "dropped"}.get(config.overlong, "split"): len(overlong)},
        unlearnt=sum(len(tally.unlearnt) for tally in read.tallies),
        duplicates=len(read.documents) - len({found for _, _, found in read.documents}),
        documents=len(documents),
        tokens=len(documents.tokens),
        learnt_tokens=int(np.count_nonzero(documents.weights)),
        rows=len(plan),
        fill=len(documents.tokens) / (len(plan) * limit),
    )
    fingerprint = _fingerprint(documents, sources, config)
    return Dataset(documents, tuple(sources), statistics, fingerprint, limit, config.packing, config.shuffle)


def _fit(document: Document, config: DataConfig) -> list[Document]:
    """The document as `data.overlong` leaves it."""
    length, limit = len(document.tokens), config.max_length
    if length <= limit:
        return [document]
    if config.overlong == "drop":
        return []
    if config.overlong == "truncate":
        return [Document(document.tokens[:limit], document.weights[:limit], document.record)]
    # A piece begins with the last token of the one before, so that each token is predicted once.
    pieces = []
    for start in range(0, length - 1, limit - 1):
        tokens, weights = document.tokens[start : start + limit], document.weights[start : start + limit].copy()
        weights[0] = 0.0
        pieces.append(Document(tokens, weights, document.record))
    return pieces


def _fingerprint(documents: Documents, sources: Sequence[Source], config: DataConfig) -> str:
    ranges = [(source.start, source.stop, source.weight) for source in sources]
    content = hashlib.sha256(repr((ranges, config.max_length, config.packing, config.shuffle)).encode())
    for array in (documents.tokens, documents.weights, documents.lengths):
        content.update(array.tobytes())
    return content.hexdigest()
