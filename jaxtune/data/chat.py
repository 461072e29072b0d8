"""Conversations to text, and which of it is learnt: the chat template decides, and says where it has put each turn."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from jaxtune.config import DataConfig
from jaxtune.data.builtin_templates import chat_template_source
from jaxtune.data.forms import Chat, Message
from jaxtune.data.sandbox import TemplateLimitError
from jaxtune.data.templates import ChatTemplate, Rendered, Span
from jaxtune.errors import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two answers that begin and end with different letters, to see what a template writes around any answer.
_PROBES = ("jaxtune probes the turn", "how is this turn ended?")
_REMEDY = (
    "set data.train_on to all, name another data.chat_template, or put {% generation %} around the assistant's turns "
    "in this one"
)

WeightedSpan = tuple[int, int, float]


class ChatRenderer:
    """A tokenizer's chat template, or the one named in the configuration, ready to say what is learnt of a text.

    Learnt of an assistant's turn is what the model would have to write itself: all that the template writes after the
    generation prompt, up to and with the end of the turn. Where a template has {% generation %} blocks, these say it.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot serve.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        source = chat_template_source(config, tokenizer)
        variables = {**tokenizer.special_tokens_map, **(config.template_variables or {})}
        self.template = ChatTemplate(source, variables, datetime.date.fromisoformat(config.template_date))
        self.train_on = config.train_on
        self.headers: list[str] = []
        self.end = ""
        if self.train_on != "all" and not self.template.has_generation_blocks:
            self.headers, self.end = self._probe()

    def render(self, chat: Chat, at: str) -> tuple[str, list[WeightedSpan], bool]:
        """The text; the spans of it with a weight in the loss, of which a later one overrides an earlier; and whether
        the template has left out or rewritten text of a message, as some do with earlier reasoning.

        Raises:
            UserError: the template refuses the conversation, or leaves something of it out.
            TemplateLimitError: it has been stopped, which is no record's fault.
        """
        rendered = self._render(chat.messages, chat.tools, at)
        altered = self._check(chat, rendered, at)
        spans: list[WeightedSpan] = [(0, len(rendered.text), 1.0)] if self.train_on == "all" else []
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        for i, weight in enumerate(chat.weights):
            usual = self.train_on != "all" and i in (answers[-1:] if self.train_on == "last_response" else answers)
            if weight is not None or usual:
                value = 1.0 if weight is None else weight
                spans += [(start, stop, value) for start, stop in self._learnt(chat, rendered, i, at)]
        return rendered.text, spans, altered

    def _render(
        self, messages: Sequence[Message], tools: Any, at: str, add_generation_prompt: bool = False
    ) -> Rendered:
        try:
            return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)
        except TemplateLimitError as error:
            raise TemplateLimitError(f"{at}: the chat template {error}; correct it, or use another") from error
        # TypeError and the like: a template that computes with what is not there.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{at}: the chat template refuses the turns ({shown(roles)}): {error}; correct them, or use another "
                "template"
            ) from error

    def _check(self, chat: Chat, rendered: Rendered, at: str) -> bool:
        """Nothing of the conversation may be lost without a word; whether some text is not as it was."""
        text = rendered.text
        for tool in chat.tools or ():
            name = tool["function"].get("name")
            if not isinstance(name, str) or name not in text:
                raise UserError(
                    f"{at}: the chat template does not write the tool {shown(name)} that the record offers; name a "
                    "data.chat_template that does, such as qwen-2.5, or remove tools from the records"
                )
        altered = False
        for i, message in enumerate(chat.messages):
            content = message["content"].strip()
            altered |= content not in text or message.get("reasoning_content", "").strip() not in text
            calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            written = "".join(text[start:stop] for start, stop in rendered.turns[i]) if calls else ""
            lost = [name for name in calls if name not in written]
            if lost or (content and message["role"] != "assistant" and content not in text and not rendered.turns[i]):
                what = f"the call of {lost[0]}" if lost else "anything"
                raise UserError(
                    f"{at}: the chat template does not write {what} of turn {i + 1} ({message['role']}); name a "
                    "data.chat_template that does, or remove the turn"
                )
            if self.end and self.end in message["content"]:
                raise UserError(
                    f"{at}: turn {i + 1} holds {self.end!r}, by which the chat template ends a turn: remove that "
                    "marker from the content, since the template writes it"
                )
        return altered

    def _learnt(self, chat: Chat, rendered: Rendered, i: int, at: str) -> list[Span]:
        """What of the text is message i's own: without the header that the generation prompt gives."""
        if self.template.has_generation_blocks and chat.messages[i]["role"] == "assistant":
            return [span for message, span in rendered.generated if message in (i, None)]
        spans = list(rendered.turns[i])
        if not spans:
            raise UserError(
                f"{at}: where the chat template writes turn {i + 1} ({chat.messages[i]['role']}) cannot be told; "
                f"{_REMEDY}"
            )
        text = rendered.text
        start, stop = spans[0]
        header = next((header for header in self.headers if text.startswith(header, start, stop)), "")
        spans[0] = start + len(header), stop
        start, stop = spans[-1]
        if i == len(chat.messages) - 1 and self.end and self.end not in text[start:stop]:
            # The template ends the last turn after its loop.
            stop = max(stop, text.find(self.end, stop) + len(self.end))
        spans[-1] = start, max(start, start + len(text[start:stop].rstrip()))
        return spans

    def _probe(self) -> tuple[list[str], str]:
        """What the template writes before an answer of the assistant's, the longest first, and after it."""
        at = "trying the chat template"
        asked = [{"role": "user", "content": "Hello"}]
        prompt, bare = self._render(asked, None, at, add_generation_prompt=True), self._render(asked, None, at)
        generation = prompt.text[len(bare.text) :] if prompt.text.startswith(bare.text) else prompt.text[prompt.tail :]
        befores, afters = [], []
        for probe in _PROBES:
            rendered = self._render([*asked, {"role": "assistant", "content": probe}], None, at)
            turn = "".join(rendered.text[start:stop] for start, stop in rendered.turns[1])
            before, found, after = turn.partition(probe)
            befores.append(before)
            afters.append(after.strip() or rendered.text[rendered.tail :].strip())
            if not found or not afters[-1]:
                raise UserError(
                    "the chat template does not write an assistant's content and then an end-of-turn marker, so "
                    f"responses would not teach the model to stop; correct the template, or {_REMEDY}"
                )
        # A template that knows no generation prompt gives the model all that stands before the content.
        headers = {_common_start([generation or befores[0], *befores])}
        # Some write an answer that others follow in another way, such as without the place for its reasoning.
        with contextlib.suppress(UserError):  # a template of one exchange alone
            exchange = [*asked, {"role": "assistant", "content": _PROBES[0]}]
            rendered = self._render(exchange * 2, None, at)
            turn = "".join(rendered.text[start:stop] for start, stop in rendered.turns[1])
            before = turn.partition(_PROBES[0])[0]
            headers.add(_common_start([generation or before, before]))
        return sorted(headers, key=len, reverse=True), afters[0]


def _common_start(texts: Sequence[str]) -> str:
    first = min(texts, key=len)
    same = itertools.takewhile(lambda i: all(text[i] == first[i] for text in texts), range(len(first)))
    return first[: sum(1 for _ in same)]
