"""Batches as a function of seed and position: every document once an epoch, and a resumed run goes on exactly."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from jaxtune.data.dataset import Dataset, Source, Statistics
from jaxtune.data.documents import Document, Documents
from jaxtune.data.encoding import Tally
from jaxtune.data.loader import Loader, Position, Prefetch
from jaxtune.data.packing import Batch

NAMES = {"tokens", "targets", "loss_weights", "positions", "segment_ids"}


def dataset(lengths: list[int], *, packing: bool = False, shuffle: bool = True, **weights: float) -> Dataset:
    """Documents that say their own number, from 1, in every token. weights: so many sources, which share them."""
    documents = [Document(np.full(n, i, np.int32), np.ones(n, np.float32)) for i, n in enumerate(lengths, 1)]
    size = len(lengths) // max(len(weights), 1)
    sources = tuple(
        Source(name, "text", i * size, (i + 1) * size, weight, Tally())
        for i, (name, weight) in enumerate((weights or {"all": 1.0}).items())
    )
    return Dataset(Documents(documents), sources, Statistics(), "", 6, packing, shuffle)


def seen(batch: Batch) -> list[list[int]]:
    """The documents of each row of a batch."""
    assert set(batch) == NAMES
    rows = zip(batch["tokens"].reshape(-1, 6), batch["segment_ids"].reshape(-1, 6))
    return [[int(tokens[segments == s][0]) for s in range(1, segments.max() + 1)] for tokens, segments in rows]


def documents(batches: Iterator[tuple[Batch, Position]], count: int) -> list[int]:
    rows = itertools.chain.from_iterable(seen(batch) for batch, _ in batches)
    return list(itertools.islice(itertools.chain.from_iterable(rows), count))


LENGTHS = np.random.default_rng(0).integers(1, 7, 23).tolist()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("count", "batch_size", "accumulation"), [(7, 2, 3), (12, 2, 2), (5, 4, 2), (1, 3, 1)])
def test_every_epoch_takes_every_document_once(count: int, batch_size: int, accumulation: int, packing: bool) -> None:
    loader = Loader(dataset(LENGTHS[:count], packing=packing), batch_size, accumulation, seed=3)
    first = next(loader.batches())[0]
    assert all(values.shape == (accumulation, batch_size, 6) for values in first.values())
    order = documents(loader.batches(), 6 * count)
    epochs = [order[i * count : (i + 1) * count] for i in range(6)]
    assert all(sorted(epoch) == list(range(1, count + 1)) for epoch in epochs)
    assert count < 5 or len({tuple(epoch) for epoch in epochs}) == 6


def test_batch_depends_on_seed_and_step_alone() -> None:
    def loader(seed: int) -> Loader:
        return Loader(dataset(LENGTHS, packing=True), 2, 2, seed)

    first, second = loader(3), loader(3)
    forwards = [seen(batch) for batch, _ in itertools.islice(first.batches(), 9)]
    backwards = [seen(second.batch(step)) for step in reversed(range(9))]
    assert forwards == backwards[::-1]
    assert forwards != [seen(loader(4).batch(step)) for step in range(9)]


def test_order_stays_the_same_from_release_to_release() -> None:
    loader = Loader(dataset([1] * 8), 4, 2, seed=3407)
    assert [seen(loader.batch(step)) for step in (0, 1)] == [
        [[2], [4], [8], [3], [1], [6], [5], [7]],
        [[5], [2], [4], [7], [1], [6], [3], [8]],
    ]


def test_without_shuffling_documents_come_in_order() -> None:
    loader = Loader(dataset([1] * 5, shuffle=False), 2, 1, seed=3)
    assert [seen(loader.batch(step)) for step in range(3)] == [[[1], [2]], [[3], [4]], [[5], [1]]]


def test_rows_of_many_documents_come_no_earlier_than_others() -> None:
    lengths = [1] * 300 + [6] * 50
    order = documents(Loader(dataset(lengths, packing=True), 1, 1, seed=1).batches(), 350)
    long_at = [place for place, document in enumerate(order) if document > 300]
    # Uniform places have a mean of 175 and a standard error of 14.
    assert abs(np.mean(long_at) - 175) < 60


def test_killed_at_any_batch_a_run_goes_on_as_if_it_had_not_been() -> None:
    data, count = dataset(LENGTHS, packing=True), 4 * len(LENGTHS)
    whole = documents(Loader(data, 3, 2, seed=5).batches(), count)
    rng = np.random.default_rng(1)
    for _ in range(20):
        position, before = Position(), []
        while len(before) < count - 30:
            # Each start has a batch size of its own, and ends after a number of batches that nobody chose.
            loader = Loader(data, int(rng.integers(1, 5)), int(rng.integers(1, 4)), seed=5)
            taken = list(itertools.islice(loader.batches(position), int(rng.integers(1, 4))))
            before += itertools.chain.from_iterable(row for batch, _ in taken for row in seen(batch))
            position = taken[-1][1]
        after = documents(Loader(data, 2, 1, seed=5).batches(position), count)
        assert (before + after)[:count] == whole


def test_steps_of_epochs() -> None:
    loader = Loader(dataset([1] * 10), 2, 2, seed=0)
    assert loader.steps_per_epoch == 2.5
    assert [loader.steps(epochs) for epochs in (0.01, 0.4, 1, 2, 0.1 * 3 / 0.3 * 2)] == [1, 1, 3, 5, 5]
    assert loader.position(6) == Position(2, 4)


def test_weights_say_how_often_an_epoch_takes_a_source() -> None:
    loader = Loader(dataset([1] * 24, a=2.0, b=0.5, c=1.25), 1, 1, seed=2)
    per_epoch = 2 * 8 + 4 + 8 + 2
    order = documents(loader.batches(), 4 * per_epoch)
    epochs = [order[i * per_epoch : (i + 1) * per_epoch] for i in range(4)]
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=25)[1:]
        assert (counts[:8] == 2).all()
        assert counts[8:16].sum() == 4
        assert sorted(counts[16:]) == [1] * 6 + [2] * 2
    # All have their turn before one has its second.
    assert (np.bincount(epochs[0] + epochs[1], minlength=25)[9:17] == 1).all()
    assert (np.bincount(order, minlength=25)[17:] == 5).all()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 9])
def test_eval_takes_every_document_once_and_pads_the_last_batch(batch_size: int) -> None:
    batches = list(dataset(LENGTHS[:7]).eval_batches(batch_size))
    assert all(values.shape == (batch_size, 6) for batch in batches for values in batch.values())
    rows = [row for batch in batches for row in seen(batch)]
    assert rows == [*([i] for i in range(1, 8)), *[[]] * (-7 % batch_size)]
    padding = batches[-1]["tokens"] == 0
    assert all((values[padding] == 0).all() for values in batches[-1].values())


def test_prefetch_gives_the_same_items_ahead_of_their_use() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(5):
            made.append(i)
            yield i

    with Prefetch(items(), ahead=2) as prefetched:
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        # Two wait, and a third is held by the thread.
        assert made == [0, 1, 2]
        assert list(prefetched) == [0, 1, 2, 3, 4]
        with pytest.raises(StopIteration):
            next(prefetched)


def test_prefetch_passes_errors_on_and_leaves_no_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    before = threading.active_count()
    with Prefetch(broken()) as prefetched:
        assert next(prefetched) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(prefetched)
    with Prefetch(itertools.count()) as endless:
        assert next(endless) == 0
    assert threading.active_count() == before
