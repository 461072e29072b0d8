"""From the sources of one split to its documents, with an account of what became of every record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from jaxtune.config import DataConfig
from jaxtune.data.documents import Document, Documents
from jaxtune.data.encoding import Encoder, Tally
from jaxtune.data.forms import Form, detect_form
from jaxtune.data.packing import Batch, RowPlan, lay_out, plan_rows
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
        return max(int(document.tokens.max()) for document in self.documents)

    def eval_batches(self, batch_size: int, share: slice = slice(None)) -> Iterator[Batch]:
        """Every document once, in order, by field name, each [batch_size, T]; the last batch is filled with padding.

        share: which rows of each are laid out, where other processes have the rest.
        """
        plan = self.rows
        for start in range(0, len(plan), batch_size):
            rows = [plan.row(row) for row in range(start, min(start + batch_size, len(plan)))]
            filled = rows + [[]] * (batch_size - len(rows))
            yield lay_out(self.documents, filled[share], self.max_length)


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

    encoder = Encoder(tokenizer, config)
    tallies = [Tally() for _ in opened]
    forms = [detect_form(source.columns, config, source.name) for source, _ in opened]
    counts: list[int] = []

    def read() -> Iterator[Document]:
        for (source, _), form, tally in zip(opened, forms, tallies):
            counts.append(0)
            for document in encoder.encode(source, form, tally):
                counts[-1] += 1
                yield document

    documents = Documents(read(), vocabulary=len(tokenizer), directory=config.tokens_dir)
    origin = np.repeat(np.arange(len(counts)), counts)
    if config.eval_fraction is not None:
        kept = _held_out(documents.digests, config.eval_fraction) == (split != "train")
        if len(documents) and not kept.any():
            raise UserError(
                f"data.eval_fraction {config.eval_fraction} of {len(documents)} records with "
                f"{len(np.unique(documents.digests))} different texts leaves none to learn; name held-out records in "
                "data.eval instead"
            )
        documents, origin = documents.part(np.flatnonzero(kept)), origin[kept]
    accounts = [
        Source(source.name, form, 0, 0, weight, tally) for (source, weight), form, tally in zip(opened, forms, tallies)
    ]
    return _finish(documents, origin, accounts, config)


def eval_sets(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Every evaluation set that the configuration names, by its name; one held out of the training data is `eval`."""
    names = ["eval"] if config.eval_fraction is not None else list(config.eval_sets)
    return {name: build(config, tokenizer, name) for name in names}


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


def _held_out(digests: np.ndarray, fraction: float) -> Bool[np.ndarray, " documents"]:
    """Which documents are held out. By digest, so that equal records stay together."""
    _, which, counts = np.unique(digests, return_inverse=True, return_counts=True)
    wanted = max(1, round(fraction * len(digests)))
    return (np.cumsum(counts) - counts < wanted)[which]


def _finish(
    read: Documents, origin: Int[np.ndarray, " documents"], sources: Sequence[Source], config: DataConfig
) -> Dataset:
    """Bring the documents to the length of a row, leave out those that teach nothing, and account for them all.

    origin: the number of each one's source.
    """
    limit = config.max_length
    overlong = np.flatnonzero(read.lengths > limit)
    if len(overlong) and config.overlong == "error":
        raise UserError(
            f"{sources[origin[overlong[0]]].name}: {len(overlong)} of {len(read)} records are longer than "
            f"data.max_length {limit} (first: record {read.records[overlong[0]]}; longest: {read.lengths.max()} "
            "tokens); raise it, or set data.overlong to drop, truncate or split"
        )
    index, pieces = _fit(read, config)
    learnt = pieces.learnt()
    learning = np.flatnonzero(learnt)
    documents, learning_origin = pieces.part(learning), origin[index[learning]]
    accounts = []
    for number, source in enumerate(sources):
        start, stop = np.searchsorted(learning_origin, [number, number + 1]).tolist()
        source.tally.overlong = read.records[overlong[origin[overlong] == number]].tolist()
        source.tally.unlearnt = pieces.records[(learnt == 0) & (origin[index] == number)].tolist()
        count = stop - start
        if count and round(source.weight * count) == 0:
            raise UserError(
                f"data.train.{source.name} has {count} documents and the weight {source.weight:g}, so an epoch would "
                f"take none of them; set the weight to {1 / count:.2g} or more, or remove the source"
            )
        accounts.append(dataclasses.replace(source, start=start, stop=stop))
    tallies = [source.tally for source in sources]
    records_read = sum(tally.records for tally in tallies)
    if not len(documents):
        bad = sum(tally.bad for tally in tallies)
        dropped = len(overlong) if config.overlong == "drop" else 0
        hint = "check for assistant turns, or raise data.max_length"
        if config.response_part is not None:
            hint = f"check that data.response_part {config.response_part!r} stands in the texts, letter for letter"
        raise UserError(
            f"{', '.join(source.name for source in sources)}: none of {records_read} records has anything to learn "
            f"({dropped} dropped as longer than data.max_length {limit}, {bad} bad); {hint}"
        )
    plan = plan_rows(documents.lengths, np.arange(len(documents)), limit, config.packing)
    tokens = int(documents.lengths.sum())
    statistics = Statistics(
        records=records_read,
        bad=sum(tally.bad for tally in tallies),
        altered=sum(tally.altered for tally in tallies),
        **{{"truncate": "truncated", "drop": "dropped"}.get(config.overlong, "split"): len(overlong)},
        unlearnt=sum(len(tally.unlearnt) for tally in tallies),
        duplicates=len(read) - len(np.unique(read.digests)),
        documents=len(documents),
        tokens=tokens,
        learnt_tokens=int(learnt.sum()),
        rows=len(plan),
        fill=tokens / (len(plan) * limit),
    )
    fingerprint = _fingerprint(documents, accounts, config)
    return Dataset(documents, tuple(accounts), statistics, fingerprint, limit, config.packing, config.shuffle)


def _fit(read: Documents, config: DataConfig) -> tuple[Int[np.ndarray, " pieces"], Documents]:
    """The documents as `data.overlong` leaves them, and the number of the document that each was."""
    lengths, limit = read.lengths, config.max_length
    everything = np.arange(len(lengths))
    if config.overlong == "drop":
        kept = everything[lengths <= limit]
        return kept, read.part(kept)
    if config.overlong == "truncate":
        return everything, read.part(everything, lengths=np.minimum(lengths, limit))
    # A piece begins with the last token of the one before, so that each token is predicted once.
    counts = np.where(lengths > limit, -(-(lengths - 1) // (limit - 1)), 1)
    index = np.repeat(everything, counts)
    offsets = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)) * (limit - 1)
    return index, read.part(index, offsets, np.minimum(lengths[index] - offsets, limit))


def _fingerprint(documents: Documents, sources: Sequence[Source], config: DataConfig) -> str:
    ranges = [(source.start, source.stop, source.weight) for source in sources]
    content = hashlib.sha256(repr((ranges, config.max_length, config.packing, config.shuffle)).encode())
    for document in documents:
        content.update(document.tokens.tobytes())
    for document in documents:
        content.update(document.weights.tobytes())
    content.update(documents.lengths.tobytes())
    return content.hexdigest()
