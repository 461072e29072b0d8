"""Documents to rows of one length. Segment ids keep a row's documents apart: attention and loss never cross them."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int, Int32

from jaxtune.data.encoding import Document

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of T tokens; padding is 0 in every array.

    targets: the next token of the same document. loss_weights: that target's weight in the loss.
    positions: from 0 in each document. segment_ids: 1, 2, ... along a row; 0 is padding.
    """

    tokens: Int32[np.ndarray, "rows T"]
    targets: Int32[np.ndarray, "rows T"]
    loss_weights: Float32[np.ndarray, "rows T"]
    positions: Int32[np.ndarray, "rows T"]
    segment_ids: Int32[np.ndarray, "rows T"]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: Int[np.ndarray, " ..."]) -> Batch:
        """The rows of the given numbers, by field name, each [..., T]."""
        return {field.name: getattr(self, field.name)[indices] for field in dataclasses.fields(self)}


def pack(documents: Sequence[Document], max_length: int, packing: bool) -> Rows:
    """Documents, each of 1 to max_length tokens, in as few rows of max_length as best fit finds; or one in each row.

    Deterministic. Rows come in the order of their first documents, and a row's documents in their own order.
    """
    lengths = np.array([len(document.tokens) for document in documents], np.int64)
    assert 0 < lengths.min() <= lengths.max() <= max_length
    row = assign_rows(lengths, max_length) if packing else np.arange(len(lengths))
    order = np.argsort(row, kind="stable")
    row, lengths = row[order], lengths[order]

    # Of each document: where it begins in all tokens laid end to end, the first document of its row, its column there.
    begins = np.cumsum(lengths) - lengths
    first = np.searchsorted(row, row)
    column = begins - begins[first]
    segment = np.arange(len(row)) - first + 1

    tokens = np.concatenate([documents[i].tokens for i in order])
    weights = np.concatenate([documents[i].weights for i in order])
    followed = np.ones(len(tokens), bool)
    followed[begins + lengths - 1] = False
    place = np.repeat(row * max_length + column - begins, lengths) + np.arange(len(tokens))

    def spread(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        out = np.zeros((int(row[-1]) + 1, max_length), dtype)
        out.reshape(-1)[place] = values
        return out

    return Rows(
        tokens=spread(tokens, np.int32),
        targets=spread(np.where(followed, np.roll(tokens, -1), 0), np.int32),
        loss_weights=spread(np.where(followed, np.roll(weights, -1), 0), np.float32),
        positions=spread(np.arange(len(tokens)) - np.repeat(begins, lengths), np.int32),
        segment_ids=spread(np.repeat(segment, lengths), np.int32),
    )


def assign_rows(lengths: Int[np.ndarray, " documents"], capacity: int) -> Int[np.ndarray, " documents"]:
    """Row of each document: best fit decreasing, the longest first, each into the fullest row that still has room."""
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    count = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect.bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row, count = capacity, count, count + 1
        rows[document] = row
        if room > length:
            bisect.insort(open_rows, (room - length, row))
    # Numbered anew by first document, so that rows follow the data's order and not the lengths'.
    first = np.full(count, len(lengths))
    np.minimum.at(first, rows, np.arange(len(lengths)))
    return np.argsort(np.argsort(first))[rows]
