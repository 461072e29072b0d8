"""Packed rows to batches, each a pure function of the seed and the step: a run resumes from its step number alone."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int

from jaxtune.config import DataConfig
from jaxtune.data.encoding import Document, Encoder, Tally
from jaxtune.data.forms import detect_form
from jaxtune.data.packing import Batch, Rows, pack
from jaxtune.data.sources import open_records
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What became of the records.

    records: read. truncated, dropped: those longer than a row, by `data.overlong`. unlearnt: left out, as they have
    nothing to learn. documents: in the rows. tokens: theirs. learnt_tokens: with weight in the loss.
    fill: share of the rows' places that hold a token.
    """

    records: int
    truncated: int
    dropped: int
    unlearnt: int
    documents: int
    tokens: int
    learnt_tokens: int
    rows: int
    fill: float


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split, packed. fingerprint: hash of the rows and of the settings that made them, not of where they lay."""

    rows: Rows
    statistics: Statistics
    fingerprint: str

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in order, by field name, each [batch_size, T]; the last batch is filled up with padding."""
        for start in range(0, len(self.rows), batch_size):
            batch = self.rows.take(np.arange(start, min(start + batch_size, len(self.rows))))
            missing = batch_size - len(batch["tokens"])
            yield {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}


class Loader:
    """Training batches. Rows come in a new order each epoch; a batch may end one epoch and begin the next.

    So no row is skipped or repeated within an epoch, and where there are fewer rows than a step takes, the step takes
    rows of several epochs.
    """

    def __init__(self, rows: Rows, batch_size: int, accumulation: int, seed: int, shuffle: bool) -> None:
        """batch_size: rows per micro-batch. accumulation: micro-batches per step. shuffle: or the rows' own order."""
        self.rows = rows
        self.shape = (accumulation, batch_size)
        self.seed = seed
        self.shuffle = shuffle
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass over the rows takes; no whole number in general."""
        return len(self.rows) / math.prod(self.shape)

    def steps(self, epochs: float) -> int:
        """The least number of steps, at least one, that sees the rows `epochs` times."""
        # The tolerance is for epochs such as 0.1 x 3 whose product with the rows is whole but for rounding.
        return max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))

    def batch(self, step: int) -> Batch:
        """Batch of a step, counted from 0, by field name: each [accumulation, batch_size, T]."""
        size = math.prod(self.shape)
        places = np.arange(step * size, (step + 1) * size)
        epochs, within = np.divmod(places, len(self.rows))
        indices = [self._order(int(epoch))[place] for epoch, place in zip(epochs, within)]
        return self.rows.take(np.array(indices).reshape(self.shape))

    def _make_order(self, epoch: int) -> Int[np.ndarray, " rows"]:
        if not self.shuffle:
            return np.arange(len(self.rows))
        # Sorting raw bits: NumPy keeps its bit streams from release to release, but not its shuffles.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        return np.argsort(bits.random_raw(len(self.rows)), kind="stable")


def build(config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Literal["train", "eval"] = "train") -> Dataset:
    """Read, encode and pack one split of the data.

    Raises:
        UserError: see `load_records`, `detect_form` and `encode`; also a document that is too long, where
            `data.overlong` is error, and a split with nothing to learn.
    """
    names, part = (config.sources, config.train_split) if split == "train" else (config.eval_sets, config.eval_split)
    if not names:
        raise UserError("data.eval names no file or dataset; set it, or ask for no evaluation")
    name = next(iter(names if split == "train" else config.eval_sets.values()))
    records = open_records(name, part)
    form = detect_form(records.columns, config, name)
    encoded = list(Encoder(tokenizer, config).encode(records, form, Tally()))

    documents, overlong = _fit(encoded, config, name)
    learning = [document for document in documents if document.weights.any()]
    if not learning:
        raise UserError(
            f"{name}: none of {len(encoded)} records has anything to learn ({len(encoded) - len(documents)} dropped as "
            f"longer than data.max_length {config.max_length}); check for assistant turns, or raise data.max_length"
        )
    rows = pack(learning, config.max_length, config.packing)
    tokens = sum(len(document.tokens) for document in learning)
    statistics = Statistics(
        records=len(encoded),
        truncated=overlong if config.overlong == "truncate" else 0,
        dropped=overlong if config.overlong == "drop" else 0,
        unlearnt=len(documents) - len(learning),
        documents=len(learning),
        tokens=tokens,
        learnt_tokens=int(np.count_nonzero(rows.loss_weights)),
        rows=len(rows),
        fill=tokens / rows.tokens.size,
    )
    return Dataset(rows, statistics, _fingerprint(rows, config))


def _fit(documents: list[Document], config: DataConfig, name: str) -> tuple[list[Document], int]:
    """The documents as `data.overlong` leaves them, and how many were longer than a row."""
    limit = config.max_length
    overlong = [i for i, document in enumerate(documents) if len(document.tokens) > limit]
    if overlong and config.overlong == "error":
        longest = max(len(documents[i].tokens) for i in overlong)
        raise UserError(
            f"{name}: {len(overlong)} of {len(documents)} records are longer than data.max_length {limit} (first: "
            f"record {overlong[0] + 1}; longest: {longest} tokens); raise it, or set data.overlong to drop or truncate"
        )
    if config.overlong == "drop":
        return [document for document in documents if len(document.tokens) <= limit], len(overlong)
    return [Document(document.tokens[:limit], document.weights[:limit]) for document in documents], len(overlong)


def _fingerprint(rows: Rows, config: DataConfig) -> str:
    digest = hashlib.sha256(repr((rows.tokens.shape, config.packing, config.overlong, config.shuffle)).encode())
    for field in dataclasses.fields(rows):
        digest.update(getattr(rows, field.name).tobytes())
    return digest.hexdigest()
