"""Chat templates: Jinja in a sandbox, as transformers runs them, with a record of which text is which message's.

A template is a program, and many write a turn differently when others follow it. So where a turn stands in the text is
read from the run itself: every loop of the template is made to say which message it is at, and when it is over.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.visitor

from jaxtune.data.sandbox import LimitedSandbox
from jaxtune.errors import UserError

Span = tuple[int, int]

# Marks in the rendered text, made of code points that Unicode keeps for a program's own use.
_OPEN, _CLOSE, _GENERATION, _ENDGENERATION, _AT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_MARKS = re.compile(f"{_AT}(\\d+){_AT}|[{_OPEN}{_CLOSE}{_GENERATION}{_ENDGENERATION}]")
_RESERVED = re.compile("[\ufdd0-\ufdd4]")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, and spans of it, as [start, end) in characters.

    turns: for each message the text that the template wrote while a loop of it was at this message.
    generated: the {% generation %} blocks, each with the number of its message, if known.
    tail: where the text begins that follows the last loop.
    """

    text: str
    turns: list[list[Span]]
    generated: list[tuple[int | None, Span]]
    tail: int


class ChatTemplate:
    """One compiled template.

    source: Jinja. variables: what it sees beside messages and tools, such as bos_token and eos_token.
    date: the day that `strftime_now` gives: a fixed one, so that the same records give the same text on every day.
    asked_date: whether any rendering has used it.

    Raises UserError for what is no Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], date: datetime.date) -> None:
        self.source = source
        self.variables = {"documents": None, **variables}
        self.asked_date = False

        def strftime_now(form: str) -> str:
            self.asked_date = True
            return date.strftime(form)

        self._environment = environment = _environment(strftime_now)
        try:
            self._plain = environment.compiled(environment.parse(source))
            tree = environment.parse(source)
            texts = tree.find_all(jinja2.nodes.TemplateData)
            self.has_generation_blocks = any(node.data == _GENERATION for node in texts)
            self._marked = environment.compiled(_MarkLoops().visit(tree))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is no valid Jinja, line {error.lineno}: {error}; correct it") from error
        # Of what is nested too deeply, and of numbers of thousands of digits.
        except (RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise UserError(f"the chat template cannot be compiled: {error}; correct it") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """The text that transformers' `apply_chat_template` gives, save the date.

        Raises:
            jinja2.TemplateError, TypeError: the template refuses the messages.
            TemplateLimitError: it runs on, or makes more text than any conversation has.
            ValueError: this template's text cannot be taken apart into turns.
        """
        given = {"tools": tools, "add_generation_prompt": add_generation_prompt, **self.variables}
        self._environment.begin()
        plain = self._plain.render(messages=messages, **given)
        if self.has_generation_blocks:
            plain = plain.replace(_GENERATION, "").replace(_ENDGENERATION, "")
        if _RESERVED.search(plain):
            raise ValueError("it holds one of the code points U+FDD0 to U+FDD4, which no text should; remove them")
        turns = [_Message(message, number) for number, message in enumerate(messages)]
        self._environment.begin()
        rendered = _read(self._marked.render(messages=turns, **given), len(turns))
        if rendered.text != plain:
            raise ValueError("the chat template reworks its own text, so its turns cannot be told apart")
        return rendered


class _Message(dict[str, Any]):
    """A message that knows its number, which a template cannot see."""

    def __init__(self, message: Mapping[str, Any], number: int) -> None:
        super().__init__(message)
        self._number = number


def _mark_message(item: object) -> str:
    return f"{_AT}{item._number}{_AT}" if isinstance(item, _Message) else ""


class _MarkLoops(jinja2.visitor.NodeTransformer):
    """Each loop opens, says at every turn which message it is at (if its items are messages), and closes."""

    def visit_For(self, node: jinja2.nodes.For) -> list[jinja2.nodes.Node]:
        self.generic_visit(node)
        if isinstance(node.target, jinja2.nodes.Name):
            item = jinja2.nodes.Name(node.target.name, "load")
            call = jinja2.nodes.Call(jinja2.nodes.Name("_mark_message", "load"), [item], [], None, None)
            node.body.insert(0, jinja2.nodes.Output([call]))
        return [_output(_OPEN), node, _output(_CLOSE)]


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, by which a template says what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope([_output(_GENERATION), *body, _output(_ENDGENERATION)]).set_lineno(line)


def _output(mark: str) -> jinja2.nodes.Output:
    return jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)])


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own, which would also take names that lead into Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        jinja2.utils.Namespace.__init__(self, *rest, **values)
        for name in dict(*rest, **values):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template must not set {name!r} on a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(strftime_now: Any) -> LimitedSandbox:
    """What chat templates are written for: the options, filters and functions that transformers gives them."""
    extensions = [_GenerationBlocks, jinja2.ext.loopcontrols]
    environment = LimitedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions, filters={"tojson": _tojson}
    )
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": strftime_now,
        "namespace": _Namespace,
        "_mark_message": _mark_message,
    }
    return environment


def _read(marked: str, messages: int) -> Rendered:
    """Take the marks out of a rendered text, and note what they say."""
    pieces: list[str] = []
    turns: list[list[Span]] = [[] for _ in range(messages)]
    generated: list[tuple[int | None, Span]] = []
    loops: list[int | None] = []  # the message that each loop around this place is at
    blocks: list[int] = []  # where each generation block around it began
    at = length = tail = 0
    for mark in _MARKS.finditer(marked):
        length = _take(marked[at : mark.start()], length, pieces, turns, loops)
        at = mark.end()
        if mark[1]:
            loops[-1] = int(mark[1])
        elif mark[0] == _OPEN:
            loops.append(None)
        elif mark[0] == _CLOSE:
            loops.pop()
            tail = length
        elif mark[0] == _GENERATION:
            blocks.append(length)
        else:
            generated.append((_innermost(loops), (blocks.pop(), length)))
    _take(marked[at:], length, pieces, turns, loops)
    return Rendered("".join(pieces), turns, generated, tail)


def _take(piece: str, start: int, pieces: list[str], turns: list[list[Span]], loops: list[int | None]) -> int:
    """Add a piece of text to that of the message it belongs to; where it ends."""
    end = start + len(piece)
    message = _innermost(loops)
    if piece:
        pieces.append(piece)
    if piece and message is not None:
        spans = turns[message]
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return end


def _innermost(loops: list[int | None]) -> int | None:
    return next((message for message in reversed(loops) if message is not None), None)
