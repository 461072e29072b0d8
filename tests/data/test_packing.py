"""Rows against a plain loop, and the promises of the packing."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from jaxtune.data.encoding import Document
from jaxtune.data.packing import Rows, assign_rows, pack


def random_documents(lengths: list[int] | np.ndarray, seed: int) -> list[Document]:
    """Tokens are never 0, so that padding shows."""
    rng = np.random.default_rng(seed)
    return [
        Document(
            rng.integers(1, 50, n).astype(np.int32),
            (rng.integers(0, 3, n) / 2 * (np.arange(n) > 0)).astype(np.float32),
        )
        for n in lengths
    ]


def unpacked(rows: Rows) -> list[Document]:
    """The documents in the rows, row by row; every array is checked against its definition on the way."""
    documents = []
    for row in range(len(rows)):
        segments = rows.segment_ids[row]
        used = int((segments > 0).sum())
        assert not segments[used:].any()
        for values in rows.take(np.array(row)).values():
            assert not values[used:].any()
        for segment in range(1, int(segments.max()) + 1):
            (places,) = np.nonzero(segments == segment)
            n = len(places)
            assert places.tolist() == list(range(places[0], places[0] + n))
            tokens, weights = rows.tokens[row, places], rows.loss_weights[row, places]
            assert rows.positions[row, places].tolist() == list(range(n))
            assert rows.targets[row, places].tolist() == [*tokens[1:], 0]
            assert weights[-1] == 0
            documents.append(Document(tokens, np.concatenate([[0], weights[:-1]])))
    return documents


def keys(documents: list[Document]) -> list[tuple[list[int], list[float]]]:
    return [(document.tokens.tolist(), document.weights.tolist()) for document in documents]


@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_every_document_once(seed: int) -> None:
    documents = random_documents(np.random.default_rng(seed).integers(1, 38, 53), seed)
    rows = pack(documents, 37, packing=True)
    found = keys(unpacked(rows))
    assert sorted(found) == sorted(keys(documents))
    # Rows by their first documents; documents in a row in order.
    order = [keys(documents).index(key) for key in found]
    starts = np.concatenate([[0], np.cumsum(rows.segment_ids.max(axis=1))])
    by_row = [order[a:b] for a, b in pairwise(starts)]
    assert all(row == sorted(row) for row in by_row)
    assert [row[0] for row in by_row] == sorted(row[0] for row in by_row)


def test_without_packing_each_document_has_its_row() -> None:
    documents = random_documents([1, 5, 9, 2], seed=5)
    rows = pack(documents, 9, packing=False)
    assert keys(unpacked(rows)) == keys(documents)
    assert rows.segment_ids.max(axis=1).tolist() == [1] * 4


def test_layout_is_typed_and_deterministic() -> None:
    documents = random_documents([3, 4, 1, 7, 7, 2], seed=6)
    first, second = pack(documents, 8, packing=True), pack(documents, 8, packing=True)
    for name, values in first.take(np.arange(len(first))).items():
        assert values.dtype == (np.float32 if name == "loss_weights" else np.int32)
        assert np.array_equal(values, getattr(second, name))


def test_best_fit_leaves_little_room() -> None:
    lengths = np.random.default_rng(7).integers(1, 100, 500)
    assigned = assign_rows(lengths, 100)
    fill = np.bincount(assigned, weights=lengths)
    assert fill.max() <= 100
    # No two rows fit into one. Best fit decreasing takes at most 11/9 of the fewest possible rows, and 6/9 of a row.
    assert np.sort(fill)[:2].sum() > 100
    assert len(fill) <= 11 / 9 * max(np.ceil(lengths.sum() / 100), (lengths > 50).sum()) + 6 / 9
    # 60 + 40 and 70 + 30: best fit finds both, whatever the order.
    assert assign_rows(np.array([30, 60, 40, 70]), 100).tolist() == [0, 1, 1, 0]


def test_packing_keeps_up_with_training() -> None:
    documents = random_documents(np.random.default_rng(8).integers(10, 400, 5000), seed=8)
    tokens = sum(len(document.tokens) for document in documents)
    start = time.perf_counter()
    pack(documents, 2048, packing=True)
    assert tokens / (time.perf_counter() - start) > 150_000
