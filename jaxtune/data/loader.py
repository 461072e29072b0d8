"""Documents in rows, rows in batches: every batch a function of the seed and of a position that counts rows.

The order of documents in an epoch depends on the seed and the epoch alone, and so do the rows that they are packed in.
A run that goes on from a position, whatever its batch size, takes each row that is left once, and so each document.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxtune.data.dataset import Dataset
from jaxtune.data.packing import Batch, RowPlan, lay_out, plan_rows


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come in its data: whole epochs, and rows of the one it is in."""

    epoch: int = 0
    row: int = 0


class Loader:
    """Training batches. A batch may end one epoch and begin the next, so no row is skipped or repeated in an epoch, and
    where there are fewer rows than a step takes, the step takes rows of several epochs.
    """

    def __init__(
        self, data: Dataset, batch_size: int, accumulation: int, seed: int, *, share: slice = slice(None)
    ) -> None:
        """batch_size: rows per micro-batch. accumulation: micro-batches per step. share: which rows of each micro-batch
        are laid out, where other processes have the rest."""
        self.data = data
        self.shape = (accumulation, batch_size)
        self.seed = seed
        self.share = share
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that the first pass over the data takes; no whole number in general."""
        return len(self._plan(0)) / math.prod(self.shape)

    def steps(self, epochs: float) -> int:
        """The least number of steps, at least one, that sees the data `epochs` times."""
        whole = int(epochs)
        rows: float = sum(len(self._plan(epoch)) for epoch in range(whole))
        if epochs > whole:
            rows += (epochs - whole) * len(self._plan(whole))
        # The tolerance is for epochs such as 0.1 x 3 whose product with the rows is whole but for rounding.
        return max(1, math.ceil(rows / math.prod(self.shape) - 1e-9))

    def position(self, step: int) -> Position:
        """Where a run stands that has taken so many steps from the start, all of this loader's size."""
        epoch, row = 0, step * math.prod(self.shape)
        while row >= len(self._plan(epoch)):
            row -= len(self._plan(epoch))
            epoch += 1
        return Position(epoch, row)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0, of a run that has taken all steps with this loader."""
        return next(self.batches(self.position(step)))[0]

    def rows(self, position: Position = Position()) -> Iterator[tuple[list[int], Position]]:
        """The documents of one row after another, without end from a position on, and the position after each."""
        while True:
            plan = self._plan(position.epoch)
            if position.row < len(plan):
                row, position = plan.row(position.row), Position(position.epoch, position.row + 1)
                yield row, position
            else:
                position = Position(position.epoch + 1, 0)

    def batches(self, position: Position = Position()) -> Iterator[tuple[Batch, Position]]:
        """Batches without end from a position on, each [accumulation, batch_size, T] or the share of it, and the
        position after each."""
        rows = self.rows(position)
        while True:
            taken = list(itertools.islice(rows, math.prod(self.shape)))
            accumulation, size = self.shape
            own = [row for n in range(accumulation) for row, _ in taken[n * size : (n + 1) * size][self.share]]
            batch = lay_out(self.data.documents, own, self.data.max_length)
            shape = accumulation, len(own) // accumulation, -1
            yield {name: values.reshape(shape) for name, values in batch.items()}, taken[-1][1]

    def tokens(self, position: Position) -> int:
        """Tokens in the whole batch that begins at a position, padding left out."""
        rows = itertools.islice(self.rows(position), math.prod(self.shape))
        return sum(int(self.data.documents.lengths[row].sum()) for row, _ in rows)

    def _make_plan(self, epoch: int) -> RowPlan:
        data = self.data
        order = self._chosen(epoch)
        if data.shuffle:
            order = order[_permutation(len(order), self.seed, epoch)]
        plan = plan_rows(data.documents.lengths, order, data.max_length, data.packing)
        if data.shuffle and data.packing:
            # Rows in the order of their first documents would begin with those that hold many.
            plan = plan.reordered(_permutation(len(plan), self.seed, epoch, 1))
        return plan

    def _chosen(self, epoch: int) -> Int[np.ndarray, " chosen"]:
        """The documents of an epoch: those of each source as many times as its weight says."""
        taken = []
        for number, source in enumerate(self.data.sources):
            documents = np.arange(source.start, source.stop)
            times, part = divmod(source.weight, 1.0)
            taken += [documents] * int(times)
            if count := round(part * len(documents)):
                # Round and round through one order, so that all have their turn.
                places = np.arange(epoch * count, (epoch + 1) * count) % len(documents)
                order = _permutation(len(documents), self.seed, number, 2)
                taken.append(np.sort(documents[order[places]]))
        return np.concatenate(taken)


class Prefetch:
    """An iterator whose items a thread makes ahead of their use. Use as a context manager, which ends the thread.

    An exception in the thread is raised where the item would have been.
    """

    def __init__(self, items: Iterator[Any], ahead: int = 2) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="jaxtune-prefetch", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            error: BaseException = StopIteration()
        except BaseException as caught:  # noqa: BLE001 - it is raised again by whoever takes the item
            error = caught
        self._put((None, error))

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Any:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()


def _permutation(count: int, *seeds: int) -> Int[np.ndarray, " count"]:
    # Sorting raw bits: NumPy keeps its bit streams from release to release, but not its shuffles.
    bits = np.random.Philox(np.random.SeedSequence(seeds))
    return np.argsort(bits.random_raw(count), kind="stable")
