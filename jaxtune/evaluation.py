"""Data that is not learnt: the loss on it, and how well the model's own answers match the ones it has."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data.dataset import Dataset
from jaxtune.data.packing import Batch
from jaxtune.decoding import Generator
from jaxtune.errors import UserError
from jaxtune.samples import TextGenerator, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Question:
    """The last stretch of a document that is learnt, as token ids, and all that stands before it."""

    prompt: list[int]
    answer: list[int]


def held_out(
    sets: Mapping[str, Dataset],
    batch_size: int,
    place: Callable[[Any], Any],
    step: Callable[..., Any],
    lora: Any,
    frozen: Any,
    share: slice = slice(None),
) -> dict[str, float]:
    """The mean loss over all learnt tokens, and its exponential: of all sets together, and where there are several of
    each as `eval_loss/NAME` and `eval_perplexity/NAME`.

    place: puts a batch [1, batch_size, T] on the device. step: what `jit_eval_step` gives. share: rows of each batch
    that `place` is given.
    """
    sums = {name: _sums(data.eval_batches(batch_size, share), place, step, lora, frozen) for name, data in sets.items()}
    values = _values("", sum(total for total, _ in sums.values()), sum(weight for _, weight in sums.values()))
    if len(sets) > 1:
        for name, (total, weight) in sums.items():
            values |= _values(f"/{name}", total, weight)
    return values


def _sums(
    batches: Iterable[Batch], place: Callable[[Any], Any], step: Callable[..., Any], lora: Any, frozen: Any
) -> tuple[float, float]:
    total = weight = 0.0
    for rows in batches:
        loss, count = step(lora, frozen, place({name: values[None] for name, values in rows.items()}))
        total, weight = total + float(loss), weight + float(count)
    return total, weight


def _values(suffix: str, total: float, weight: float) -> dict[str, float]:
    loss = total / weight
    # Beyond this, exp has no finite value; a loss that is not finite shows in itself.
    return {f"eval_loss{suffix}": loss, f"eval_perplexity{suffix}": math.exp(min(loss, 700.0))}


def check_rouge() -> None:
    """Raise UserError, naming the command to run, where rouge-score is not installed."""
    _rouge_scorer()


def questions(data: Dataset, count: int) -> list[Question]:
    """The questions of at most `count` documents, evenly spread over a set.

    Raises:
        UserError: there is no document of which a response alone is learnt.
    """
    asking = [index for index in range(len(data.documents)) if not data.documents[index].weights[1:2].any()]
    if not asking:
        raise UserError(
            f"{', '.join(source.name for source in data.sources)}: all of every document is learnt, so none has a "
            "prompt that could be answered; remove train.eval_answers, or set data.train_on to responses"
        )
    found = []
    for place in np.unique(np.linspace(0, len(asking) - 1, count).round().astype(int)):
        document = data.documents[asking[place]]
        learnt = np.flatnonzero(document.weights)
        stop = int(learnt[-1]) + 1
        start = int(np.flatnonzero(document.weights[:stop] == 0)[-1]) + 1
        found.append(Question(document.tokens[:start].tolist(), document.tokens[start:stop].tolist()))
    return found


def match_answers(
    asked: Mapping[str, Sequence[Question]],
    generator: Generator,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Answer each set's questions greedily, and compare with the answers they have, but for special tokens and white
    space at the ends.

    Returns `eval_exact_match` and, by the package rouge-score, `eval_rouge_l` (the F-measure), both in percent: of all
    sets together, and where there are several of each as `eval_rouge_l/NAME`. ROUGE counts words of the letters a
    to z and of digits, and says nothing of other scripts.

    Raises:
        UserError: rouge-score is not installed.
    """
    scorer = _rouge_scorer().RougeScorer(["rougeL"])
    every = [question for questions in asked.values() for question in questions]
    # The end of a turn need not be the end of a sequence; the documents say what it is.
    ends = {question.answer[-1] for question in every} & set(tokenizer.all_special_ids)
    text = TextGenerator(generator, tokenizer, tuple(sorted(ends.union(stop_ids(tokenizer)))))
    scores: list[tuple[bool, float]] = []
    for start in range(0, len(every), batch_size):
        batch = every[start : start + batch_size]
        # Filled with a question that is asked anyway, so that no batch of another size is compiled.
        prompts = [question.prompt for question in batch] + [every[0].prompt] * (batch_size - len(batch))
        for question, given in zip(batch, text.answers(prompts, max_new_tokens=max_new_tokens)):
            wanted = str(tokenizer.decode(question.answer, skip_special_tokens=True)).strip()
            scores.append((given.strip() == wanted, scorer.score(wanted, given)["rougeL"].fmeasure))
    values = _match_values("", scores)
    if len(asked) > 1:
        for name, questions_of in asked.items():
            values |= _match_values(f"/{name}", scores[: len(questions_of)])
            scores = scores[len(questions_of) :]
    return values


def _match_values(suffix: str, scores: Sequence[tuple[bool, float]]) -> dict[str, float]:
    exact, rouge = (100 * sum(column) / len(scores) for column in zip(*scores))
    return {f"eval_exact_match{suffix}": exact, f"eval_rouge_l{suffix}": rouge}


def _rouge_scorer() -> Any:
    try:
        return importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise UserError(
            f"train.eval_answers measures ROUGE, but rouge-score cannot be imported ({error}); run: pip install "
            '"jaxtune[rouge]"'
        ) from error
