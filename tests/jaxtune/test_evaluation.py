"""Held-out answers: what is asked and what is compared follow from the documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import save_model

from jaxtune.config import DataConfig, ModelConfig
from jaxtune.data.dataset import Dataset, build
from jaxtune.errors import UserError
from jaxtune.evaluation import check_rouge, match_answers, questions
from jaxtune.loading import load_tokenizer, resolve_source

TURNS = [
    {"role": "user", "content": "What colour is snow?"},
    {"role": "assistant", "content": "White."},
    {"role": "user", "content": "And coal?"},
    {"role": "assistant", "content": "Coal is black."},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(resolve_source(ModelConfig(str(save_model(tmp_path / "model")))))


def held(tokenizer: Any, count: int = 5, **settings: Any) -> Dataset:
    records = [{"messages": TURNS}] * count
    return build(DataConfig(train="-", max_length=128, **settings), tokenizer, records=records)


class Parrot:
    """Answers with fixed texts, a batch at a time."""

    def __init__(self, tokenizer: Any, answers: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, iter(answers)
        self.batches: list[tuple[int, int, Any]] = []

    def stream(self, prompts: Any, *, max_new_tokens: int, stop_ids: Any, **_: Any) -> Iterator[list[list[int]]]:
        self.batches.append((len(prompts), max_new_tokens, stop_ids))
        yield [self.tokenizer(next(self.texts))["input_ids"] for _ in prompts]


def test_the_last_response_is_asked_for(tokenizer: Any) -> None:
    asked = questions(held(tokenizer), 3)
    assert len(asked) == 3
    assert tokenizer.decode(asked[0].answer) == "Coal is black.<|im_end|>"
    prompt = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(asked[0].prompt) == prompt
    assert len(questions(held(tokenizer), 99)) == 5
    with pytest.raises(UserError, match=r"all of every document is learnt.*remove train\.eval_answers"):
        questions(held(tokenizer, train_on="all"), 3)


def test_answers_are_compared_without_special_tokens_and_outer_space(tokenizer: Any) -> None:
    pytest.importorskip("rouge_score", reason='pip install "jaxtune[rouge]"')
    asked = questions(held(tokenizer), 3)
    given = ["Coal is black.", " Coal  is black.\n", "black"]
    # F-measures of the longest common subsequence of words: 1, 1 and 2 * 1 * (1 / 3) / (1 + 1 / 3).
    parrot: Any = Parrot(tokenizer, [*given, "filling"])
    values = match_answers({"a": asked}, parrot, tokenizer, batch_size=2, max_new_tokens=7)
    assert values == pytest.approx({"eval_exact_match": 100 / 3, "eval_rouge_l": 100 * (1 + 1 + 0.5) / 3})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert parrot.batches == [(2, 7, (end,)), (2, 7, (end,))]

    parrot = Parrot(tokenizer, given)
    values = match_answers({"a": asked[:1], "b": asked[1:]}, parrot, tokenizer, 3, 7)
    assert values["eval_exact_match/a"] == 100
    assert values["eval_exact_match/b"] == 0
    assert values["eval_rouge_l/b"] == pytest.approx(75)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r'run: pip install "jaxtune\[rouge\]"'):
        check_rouge()
