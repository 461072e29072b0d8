"""Rows against a plain loop, and the promises of the packing."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jaxtune.data.documents import Document, Documents
from jaxtune.data.packing import WINDOW, Batch, assign_rows, lay_out, plan_rows


def random_documents(lengths: list[int] | np.ndarray, seed: int) -> list[Document]:
    """Tokens are never 0, so that padding shows; weights are 0, a half or 1."""
    rng = np.random.default_rng(seed)
    return [
        Document(
            rng.integers(1, 50, n).astype(np.int32), (rng.integers(0, 3, n) / 2 * (np.arange(n) > 0)).astype(np.float32)
        )
        for n in lengths
    ]


def packed(documents: list[Document], capacity: int, packing: bool) -> Batch:
    stored = Documents(documents)
    plan = plan_rows(stored.lengths, np.arange(len(documents)), capacity, packing)
    return lay_out(stored, [plan.row(row) for row in range(len(plan))], capacity)


def unpacked(rows: Batch) -> list[list[Document]]:
    """The documents in each row; every array is checked against its definition on the way."""
    found = []
    for row, segments in enumerate(rows["segment_ids"]):
        used = int((segments > 0).sum())
        for values in rows.values():
            assert not values[row, used:].any()
        found.append([])
        for segment in range(1, int(segments.max()) + 1):
            (places,) = np.nonzero(segments == segment)
            n = len(places)
            assert places.tolist() == list(range(places[0], places[0] + n))
            tokens, weights = rows["tokens"][row, places], rows["loss_weights"][row, places]
            assert rows["positions"][row, places].tolist() == list(range(n))
            assert rows["targets"][row, places].tolist() == [*tokens[1:], 0]
            assert weights[-1] == 0
            found[-1].append(Document(tokens, np.concatenate([[0], weights[:-1]])))
    return found


def key(document: Document) -> tuple[list[int], list[float]]:
    return document.tokens.tolist(), document.weights.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_every_document_once(seed: int) -> None:
    documents = random_documents(np.random.default_rng(seed).integers(1, 38, 53), seed)
    found = unpacked(packed(documents, 37, packing=True))
    keys = [key(document) for document in documents]
    assert sorted(key(document) for row in found for document in row) == sorted(keys)
    # Rows by their first documents; documents in a row in order.
    by_row = [[keys.index(key(document)) for document in row] for row in found]
    assert all(row == sorted(row) for row in by_row)
    assert [row[0] for row in by_row] == sorted(row[0] for row in by_row)


def test_without_packing_each_document_has_its_row() -> None:
    documents = random_documents([1, 5, 9, 2], seed=5)
    found = unpacked(packed(documents, 9, packing=False))
    assert [[key(document) for document in row] for row in found] == [[key(document)] for document in documents]


def test_layout_is_typed_and_deterministic() -> None:
    documents = random_documents([3, 4, 1, 7, 7, 2], seed=6)
    first, second = packed(documents, 8, packing=True), packed(documents, 8, packing=True)
    for name, values in first.items():
        assert values.dtype == (np.float32 if name == "loss_weights" else np.int32)
        assert np.array_equal(values, second[name])


def test_a_plan_takes_the_documents_it_is_given_in_their_order() -> None:
    lengths = np.array([4, 4, 4, 2])
    plan = plan_rows(lengths, np.array([3, 1, 3, 1]), 6, packing=True)
    assert [plan.row(row) for row in range(len(plan))] == [[3, 1], [3, 1]]
    plan = plan_rows(lengths, np.array([0, 1, 3, 2]), 6, packing=True)
    assert [plan.row(row) for row in range(len(plan))] == [[0, 3], [1], [2]]
    turned = plan.reordered(np.array([2, 0, 1]))
    assert [turned.row(row) for row in range(3)] == [[2], [0, 3], [1]]


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


@pytest.mark.parametrize(("median", "spread"), [(180, 0.9), (60, 1.2), (500, 0.6)])
def test_rows_are_97_percent_full_on_log_normal_lengths(median: int, spread: float) -> None:
    rng = np.random.default_rng(median)
    lengths = np.clip(rng.lognormal(np.log(median), spread, 2 * WINDOW + 17), 8, 2048).astype(np.int64)
    plan = plan_rows(lengths, rng.permutation(len(lengths)), 2048, packing=True)
    assert lengths.sum() / (2048 * len(plan)) >= 0.97


def test_packing_keeps_up_with_training() -> None:
    documents = random_documents(np.random.default_rng(8).integers(10, 400, 5000), seed=8)
    tokens = sum(len(document.tokens) for document in documents)
    start = time.process_time()
    packed(documents, 2048, packing=True)
    assert tokens / (time.process_time() - start) > 1_000_000
