"""Documents to rows of one length. Segment ids keep a row's documents apart: attention and loss never cross them."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxtune.data.documents import Documents

Batch = dict[str, np.ndarray]

# Documents among which a row's are chosen. More fills no better, and takes longer before the first row is known.
WINDOW = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """Which documents stand in which row: row r has documents[starts[r] : starts[r + 1]], in that order."""

    documents: Int[np.ndarray, " documents"]
    starts: Int[np.ndarray, " rows_and_1"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> list[int]:
        """The documents of one row."""
        return self.documents[self.starts[index] : self.starts[index + 1]].tolist()

    def reordered(self, order: Int[np.ndarray, " rows"]) -> RowPlan:
        """The same rows in another order."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        return RowPlan(self.documents[np.repeat(self.starts[order], counts) + within], starts)


def plan_rows(
    lengths: Int[np.ndarray, " documents"], order: Int[np.ndarray, " chosen"], capacity: int, packing: bool
) -> RowPlan:
    """Documents, taken in the given order, in as few rows as best fit finds; or one in each row.

    lengths: of all documents, each of 1 to capacity tokens. order: which of them, and a document may come twice.
    Rows come in the order of their first documents, and a row's documents in their own order.
    """
    taken = lengths[order]
    assert not len(taken) or 0 < taken.min() <= taken.max() <= capacity
    if not packing:
        return RowPlan(order, np.arange(len(order) + 1))
    rows = np.empty(len(order), np.int64)
    count = 0
    for start in range(0, len(order), WINDOW):
        window = slice(start, start + WINDOW)
        rows[window] = count + assign_rows(taken[window], capacity)
        count = int(rows[window].max()) + 1
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    return RowPlan(order[np.argsort(rows, kind="stable")], starts)


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


def lay_out(documents: Documents, rows: Sequence[Sequence[int]], capacity: int) -> Batch:
    """The arrays of rows of documents, each [rows, capacity]; padding is 0 in every one.

    tokens, int32. targets, int32: the next token of the same document. loss_weights, float32: that target's weight.
    positions, int32: from 0 in each document. segment_ids, int32: 1, 2, ... along a row; 0 is padding.
    """
    shape = len(rows), capacity
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["loss_weights"] = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            document = documents[index]
            stop = start + len(document.tokens)
            batch["tokens"][row, start:stop] = document.tokens
            batch["targets"][row, start : stop - 1] = document.tokens[1:]
            batch["loss_weights"][row, start : stop - 1] = document.weights[1:]
            batch["positions"][row, start:stop] = np.arange(stop - start)
            batch["segment_ids"][row, start:stop] = segment
            start = stop
    return batch
