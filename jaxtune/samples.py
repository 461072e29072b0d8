"""Text in, text out: prompts through the tokenizer's chat template, answers as they are made, stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from jaxtune.decoding import GREEDY, Generator
from jaxtune.errors import UserError
from jaxtune.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"  # what decoding gives for the bytes of a character that is not complete yet


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, where: str = "output.sample_prompts") -> list[int]:
    """Token ids that ask for an answer to one user message, or where there is no chat template those of the text.

    Raises:
        UserError: a chat template that refuses a lone user message, or a prompt without tokens; the text names `where`.
    """
    if tokenizer.chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}], where)
    return encode_text(tokenizer, prompt, where)


def encode_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], where: str) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next turn begins.

    Raises:
        UserError: a tokenizer without a chat template, or one that refuses these turns; the text names `where`.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; use the instruct version of the model")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{where}: the chat template refuses the turns ({roles}) with {messages[-1]['content']!r}: {error}; leave "
            f"{where} out, or correct the template"
        ) from error
    # The template has written the special tokens already.
    return _ids(tokenizer, str(text), where, add_special_tokens=False)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, where: str) -> list[int]:
    """Token ids of a plain text to be continued, with the special tokens that the tokenizer puts before a text.

    Raises:
        UserError: a text without tokens; the message names `where`.
    """
    ids = _ids(tokenizer, text, where, add_special_tokens=True)
    # Some tokenizers end every text with this token, after which there is nothing to continue.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _ids(tokenizer: PreTrainedTokenizerFast, text: str, where: str, *, add_special_tokens: bool) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    if not ids:
        raise UserError(f"{where}: the tokenizer gives no token for {text!r}; use another prompt")
    return list(ids)


def stop_ids(tokenizer: PreTrainedTokenizerFast, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end of sequence, and `eos_token_id` of each of a model's configs (its
    `config.json` and `generation_config.json`), which may be a number or a list."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for config in configs:
        ids = config.get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(sorted(found))


def end_of_text(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: Sequence[str], start: int = 0
) -> int | None:
    """How many ids there are up to and with the one that completes a stop string; None where none does.

    start: of these it is known that they hold none. Special tokens count as text, as in transformers' `stop_strings`.
    """

    def stopped(count: int) -> bool:
        text = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return any(string in text for string in stop)

    if not stop or not stopped(len(ids)):
        return None
    return next(count for count in range(start + 1, len(ids) + 1) if stopped(count))


class TextStream:
    """One row's tokens to text, as it becomes certain.

    Text is held back while it may be a part of a character, or the beginning of a stop string; the text ends before the
    first stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]

    def push(self, new: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens make certain; with `last`, all that was held back too."""
        if self.stopped:
            return ""
        self.ids += new
        # From the beginning each time: the text of a token may depend on those before it.
        text = str(self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        ends = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if ends:
            self.stopped, certain = True, min(ends)
        elif last:
            certain = len(text)
        else:
            certain = len(text.rstrip(REPLACEMENT)) if text.endswith(REPLACEMENT) else len(text)
            certain = min([certain, *(_possible_start(text, string) for string in self._stop)])
        fresh = text[len(self.text) : certain]
        self.text += fresh
        return fresh


def _possible_start(text: str, string: str) -> int:
    """Where a stop string may have begun at the end of the text."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:length]):
            return len(text) - length
    return len(text)


@dataclasses.dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer: continues encoded prompts in text. stop_ids: tokens that end an answer."""

    generator: Generator
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        room: int = 0,
    ) -> Iterator[list[str]]:
        """Continue encoded prompts; yields each row's new text, up to and without the first stop token or string.

        The pieces of a row put together are its whole text. room: see `Generator.stream`.
        """
        texts = [TextStream(self.tokenizer, stop) for _ in prompts]
        tokens = self.generator.stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=self.stop_ids, room=room
        )
        for rows in tokens:
            yield [text.push(new) for text, new in zip(texts, rows)]
            if all(text.stopped for text in texts):
                return
        yield [text.push([], last=True) for text in texts]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The whole text of each row; see `stream`."""
        pieces = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        return ["".join(row) for row in zip(*pieces)]
