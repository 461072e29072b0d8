"""Documents that are held compactly are the documents that were given, in memory and in files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune.config import DataConfig
from jaxtune.data.dataset import build
from jaxtune.data.documents import Document, Documents
from jaxtune.errors import UserError

Make = Callable[..., Any]


def random_documents(vocabulary: int) -> list[Document]:
    """Of 1 to 40 tokens, the largest ids among them, some with one weight all through, or one at each token."""
    rng, documents = np.random.default_rng(0), []
    for record in range(1, 60):
        n = int(rng.integers(1, 41))
        weights = np.repeat(rng.choice([0.0, 0.25, 1.0, 3.0], n), rng.integers(1, 9))[:n].astype(np.float32)
        weights[0] = 0.0
        documents.append(Document(rng.integers(vocabulary - 3, vocabulary, n).astype(np.int32), weights, record))
    return documents


def same(a: Document, b: Document) -> bool:
    return a.tokens.tolist() == b.tokens.tolist() and a.weights.tolist() == b.weights.tolist() and a.record == b.record


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1])
@pytest.mark.parametrize("on_disk", [False, True])
def test_documents_come_back_as_they_were(tmp_path: Path, vocabulary: int, on_disk: bool) -> None:
    given = random_documents(vocabulary)
    held = Documents(given, vocabulary=vocabulary, directory=tmp_path / "new" if on_disk else None)
    assert len(held) == len(given)
    assert all(same(a, b) for a, b in zip(held, given))
    assert held[3].tokens.dtype == np.int32
    assert held[3].weights.dtype == np.float32
    assert held.learnt().tolist() == [np.count_nonzero(document.weights) for document in given]
    # Nothing is left behind, whatever becomes of the process.
    assert not on_disk or os.listdir(tmp_path / "new") == []


def test_a_part_is_a_range_of_each_document() -> None:
    given = random_documents(50)
    index = np.array([document.record - 1 for document in given if len(document.tokens) > 6])[::-1]
    part = Documents(given).part(index, np.full(len(index), 2), np.full(len(index), 4))
    for found, document in zip(part, [given[i] for i in index]):
        weights = document.weights[2:6].copy()
        weights[0] = 0.0
        assert same(found, Document(document.tokens[2:6], weights, document.record))
    assert part.learnt().tolist() == [np.count_nonzero(document.weights) for document in part]


def test_no_documents(tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        empty = Documents(directory=directory)
        assert list(empty) == []
        assert empty.learnt().tolist() == []


def test_a_set_in_files_gives_the_same_batches(make_tokenizer: Make, write_jsonl: Make, tmp_path: Path) -> None:
    path = write_jsonl([{"text": "the cat sat on the mat " * (1 + i % 7)} for i in range(40)])
    sets = [
        build(
            DataConfig(train=path, max_length=16, overlong="split", eval_fraction=0.2, tokens_dir=directory),
            make_tokenizer(),
        )
        for directory in (None, str(tmp_path / "tokens"))
    ]
    assert sets[0].fingerprint == sets[1].fingerprint
    assert sets[0].statistics == sets[1].statistics
    for a, b in zip(sets[0].eval_batches(4), sets[1].eval_batches(4), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"data\.tokens_dir .*file/below cannot hold the tokens"):
        Documents(random_documents(50), directory=file / "below")
