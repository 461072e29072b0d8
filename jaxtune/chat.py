"""`python -m jaxtune.chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys

from jaxtune.answer_command import CHAT_HELP
from jaxtune.answer_command import chat as main

if __name__ == "__main__":
    # Before the imports below, which take seconds: help and mistakes in the arguments are answered at once.
    sys.exit(main())

import argparse
from collections.abc import Sequence
from typing import Any

from jaxtune.decoding import padded_length
from jaxtune.errors import UserError
from jaxtune.generate import load_from_arguments, read_sampling
from jaxtune.samples import TextGenerator, encode_chat
from jaxtune.sampling import Sampling

# Tokens of the shortest cache.
_LEAST_ROOM = 1024


class Conversation:
    """Turns so far, and the model that answers them.

    system: message before all turns, or None. max_new_tokens, sampling, stop: of each answer.
    """

    def __init__(
        self,
        text: TextGenerator,
        system: str | None,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> None:
        self._text, self._max_new_tokens, self._sampling, self._stop = text, max_new_tokens, sampling, stop
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict[str, str]] = []

    def undo(self) -> None:
        """Forget the last question and its answer."""
        del self.turns[-2:]

    def ask(self, question: str) -> str:
        """Print the answer as it is made, and return it; an answer cut short with Ctrl-C stays as far as it came.

        Raises:
            UserError: the conversation has no room left for an answer, or the chat template refuses it; the
                conversation is then as before.
        """
        asked = [*self._system, *self.turns, {"role": "user", "content": question}]
        ids = encode_chat(self._text.tokenizer, asked, "the conversation")
        room = self._text.generator.decoder.max_position
        if len(ids) + self._max_new_tokens > room:
            raise UserError(
                f"the conversation has {len(ids)} tokens; with {self._max_new_tokens} for the answer that is more than "
                f"the model's {room}: /clear it, or lower --max-new-tokens"
            )
        # Doubled as the conversation grows, so that not every turn compiles programs for a longer cache.
        needed = padded_length(len(ids)) + self._max_new_tokens
        settings: Any = {"max_new_tokens": self._max_new_tokens, "sampling": self._sampling, "stop": self._stop}
        answer = ""
        try:
            for (piece,) in self._text.stream([ids], **settings, room=max(_LEAST_ROOM, 1 << (needed - 1).bit_length())):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [cut short]", end="")
        print()
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return answer


def run(options: argparse.Namespace) -> int:
    """Talk until the user ends it; returns the exit status.

    Raises:
        UserError: something to correct before the conversation begins.
    """
    sampling = read_sampling(options)
    text = load_from_arguments(options)
    if not text.tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; use python -m jaxtune.generate --raw")
    talk(Conversation(text, options.system, options.max_new_tokens, sampling, options.stop))
    return 0


def talk(conversation: Conversation) -> None:
    """Read lines until the end of input or /exit, and answer each."""
    print(CHAT_HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/exit":
            return
        if line == "/clear":
            conversation.turns.clear()
        elif line == "/undo":
            conversation.undo()
        elif line.startswith("/"):
            print(CHAT_HELP, file=sys.stderr)
        elif line:
            try:
                conversation.ask(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
