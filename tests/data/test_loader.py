"""Batches as a pure function of seed and step, and what becomes of the records on the way to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxtune.config import DataConfig
from jaxtune.data.loader import Dataset, Loader, Statistics, build
from jaxtune.data.packing import Batch, Rows
from jaxtune.errors import UserError

NAMES = ("tokens", "targets", "loss_weights", "positions", "segment_ids")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def numbered_rows(count: int) -> Rows:
    """Rows that say their own number, from 1, in every array."""
    values = np.tile(np.arange(1, count + 1)[:, None], (1, 3))
    return Rows(**{name: values.astype(np.float32 if name == "loss_weights" else np.int32) for name in NAMES})


def numbers(batch: Batch) -> list[int]:
    assert set(batch) == set(NAMES)
    return batch["tokens"][..., 0].reshape(-1).tolist()


@pytest.mark.parametrize(("rows", "batch_size", "accumulation"), [(7, 2, 3), (12, 2, 2), (5, 4, 2), (1, 3, 1)])
def test_every_epoch_takes_every_row_once(rows: int, batch_size: int, accumulation: int) -> None:
    loader = Loader(numbered_rows(rows), batch_size, accumulation, seed=3, shuffle=True)
    seen: list[int] = []
    while len(seen) < 6 * rows:
        batch = loader.batch(len(seen) // (batch_size * accumulation))
        assert all(values.shape == (accumulation, batch_size, 3) for values in batch.values())
        seen += numbers(batch)
    epochs = [seen[i * rows : (i + 1) * rows] for i in range(6)]
    assert all(sorted(epoch) == list(range(1, rows + 1)) for epoch in epochs)
    assert rows < 5 or len({tuple(epoch) for epoch in epochs}) == 6


def test_batch_depends_on_seed_and_step_alone() -> None:
    first, second = (Loader(numbered_rows(11), 2, 2, seed=3, shuffle=True) for _ in range(2))
    forwards = [numbers(first.batch(step)) for step in range(9)]
    backwards = [numbers(second.batch(step)) for step in reversed(range(9))]
    assert forwards == backwards[::-1]
    assert forwards != [numbers(Loader(numbered_rows(11), 2, 2, seed=4, shuffle=True).batch(step)) for step in range(9)]


def test_order_stays_the_same_from_release_to_release() -> None:
    loader = Loader(numbered_rows(8), 4, 2, seed=3407, shuffle=True)
    assert [numbers(loader.batch(step)) for step in (0, 1)] == [[2, 4, 8, 3, 1, 6, 5, 7], [5, 2, 4, 7, 1, 6, 3, 8]]


def test_without_shuffling_rows_come_in_order() -> None:
    loader = Loader(numbered_rows(5), 2, 1, seed=3, shuffle=False)
    assert [numbers(loader.batch(step)) for step in range(3)] == [[1, 2], [3, 4], [5, 1]]


def test_steps_of_epochs() -> None:
    loader = Loader(numbered_rows(10), 2, 2, seed=0, shuffle=True)
    assert loader.steps_per_epoch == 2.5
    assert [loader.steps(epochs) for epochs in (0.01, 0.4, 1, 2, 0.1 * 3 / 0.3 * 2)] == [1, 1, 3, 5, 5]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 9])
def test_eval_takes_every_row_once_and_pads_the_last_batch(batch_size: int) -> None:
    dataset = Dataset(numbered_rows(7), Statistics(7, 0, 0, 0, 7, 21, 14, 7, 1.0), "")
    batches = list(dataset.eval_batches(batch_size))
    assert all(values.shape == (batch_size, 3) for batch in batches for values in batch.values())
    seen = [number for batch in batches for number in numbers(batch)]
    assert seen == [*range(1, 8), *[0] * (-7 % batch_size)]
    padding = batches[-1]["tokens"] == 0
    assert all((values[padding] == 0).all() for values in batches[-1].values())


def word_records(*lengths: int) -> list[dict[str, str]]:
    """Texts that give so many tokens with <s> and <|im_end|> around them."""
    return [{"text": "!" * (n - 2)} for n in lengths]


def build_text(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], path: str, split: Any = "train", **settings: Any
) -> Dataset:
    return build(DataConfig(train=path, eval=path, max_length=8, **settings), make_tokenizer(), split)


def test_overlong_records_are_refused_dropped_or_cut(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(word_records(8, 9, 3, 20))
    with pytest.raises(UserError, match=r"2 of 4 records are longer than data\.max_length 8 .*record 2.* 20 tokens"):
        build_text(make_tokenizer, path)
    assert build_text(make_tokenizer, path, overlong="drop").statistics == Statistics(
        records=4, truncated=0, dropped=2, unlearnt=0, documents=2, tokens=11, learnt_tokens=9, rows=2, fill=11 / 16
    )
    cut = build_text(make_tokenizer, path, overlong="truncate")
    assert cut.statistics == Statistics(
        records=4, truncated=2, dropped=0, unlearnt=0, documents=4, tokens=27, learnt_tokens=23, rows=4, fill=27 / 32
    )
    with pytest.raises(UserError, match=r"none of 1 records has anything to learn \(1 dropped"):
        build_text(make_tokenizer, write_jsonl(word_records(9)), overlong="drop")


def test_records_with_nothing_to_learn_are_counted_and_left_out(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], write_jsonl: Callable[..., str]
) -> None:
    ask, answer = {"role": "user", "content": "go"}, {"role": "assistant", "content": "gone"}
    tokenizer = make_tokenizer(CHATML)
    path = write_jsonl([{"messages": [ask]}, {"messages": [ask, answer]}])
    statistics = build(DataConfig(train=path), tokenizer).statistics
    assert (statistics.records, statistics.unlearnt, statistics.documents) == (2, 1, 1)
    # Cut before the response begins.
    path = write_jsonl([{"messages": [ask, answer]}])
    with pytest.raises(UserError, match="none of 1 records has anything to learn"):
        build(DataConfig(train=path, max_length=8, overlong="truncate"), tokenizer)


def test_fingerprint_follows_content_and_layout(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(word_records(8, 3, 4))
    prints = [
        build_text(make_tokenizer, path).fingerprint,
        build_text(make_tokenizer, path, packing=False).fingerprint,
        build_text(make_tokenizer, path, shuffle=False).fingerprint,
        build_text(make_tokenizer, write_jsonl(word_records(8, 4, 3), "other.jsonl")).fingerprint,
    ]
    assert len(set(prints)) == 4
    moved = write_jsonl(word_records(8, 3, 4), "moved.jsonl")
    assert build_text(make_tokenizer, moved, "eval").fingerprint == prints[0]


def test_eval_must_be_named_to_be_built(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    with pytest.raises(UserError, match=r"data\.eval names no file"):
        build(DataConfig(train="x"), make_tokenizer(), "eval")
