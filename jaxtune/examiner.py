"""What a run asks of its model: the loss on held-out sets, answers to their questions, answers to a few prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from jaxtune.base import BaseModel
from jaxtune.config import RunConfig
from jaxtune.data.dataset import Dataset
from jaxtune.decoding import Generator
from jaxtune.evaluation import Question, match_answers, questions
from jaxtune.processes import is_first
from jaxtune.samples import TextGenerator, encode_prompt, stop_ids


@dataclasses.dataclass(frozen=True)
class Examiner:
    """sets: held-out data by name. asked: questions of theirs that are answered too. prompts: their token ids, by text.

    Answers are made by the first process alone.
    """

    config: RunConfig
    base: BaseModel
    sets: Mapping[str, Dataset]
    asked: Mapping[str, list[Question]]
    prompts: Mapping[str, list[int]]

    @classmethod
    def of(cls, config: RunConfig, base: BaseModel, data: Dataset | Mapping[str, Dataset] | None) -> Examiner:
        """What a run's configuration asks for. data: the held-out set, or several by name.

        Raises:
            UserError: a prompt that cannot be encoded, or a set without questions where answers are to be measured.
        """
        sets, count = {"eval": data} if isinstance(data, Dataset) else dict(data or {}), config.train.eval_answers
        asked = {} if count is None else {name: questions(of, count) for name, of in sets.items()}
        prompts = {prompt: encode_prompt(base.tokenizer, prompt) for prompt in config.output.sample_prompts}
        return cls(config, base, sets, asked, prompts)

    def answer_questions(self, generator: Callable[[], Generator]) -> dict[str, float]:
        """How well the sets' questions are answered, as `match_answers`; empty where none is asked."""
        if not self.asked or not is_first():
            return {}
        train = self.config.train
        return match_answers(self.asked, generator(), self.base.tokenizer, train.batch_size, train.eval_answer_tokens)

    def answer_prompts(self, generator: Callable[[], Generator]) -> Iterator[tuple[str, str]]:
        """Each prompt with the greedy answer to it."""
        if not self.prompts or not is_first():
            return
        text = TextGenerator(generator(), self.base.tokenizer, stop_ids(self.base.tokenizer))
        for prompt, ids in self.prompts.items():
            yield prompt, text.answers([ids], max_new_tokens=self.config.output.sample_tokens)[0]
