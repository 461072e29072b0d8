"""Jinja's sandbox with limits: a template can neither run on for long nor fill the memory, whatever it computes.

Jinja's own keeps a template from Python's internals and from changing what it is given. Loops in loops, texts that are
doubled, and padding to a width of billions are no concern of it. Here every turn of a loop, every call and every filter
is counted, and whatever makes a text or a list is asked for its size before.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from jaxtune.errors import UserError

# Of one rendering: turns of loops, calls and filters; seconds of computation; characters and list items made in all.
STEPS, SECONDS, MADE = 1_000_000, 5.0, 2**28
# Functions and filters whose result may be as large as the product of what they are given.
_GROWING = {
    *("batch", "center", "expandtabs", "format", "indent", "join", "ljust"),
    *("rjust", "slice", "tojson", "truncate", "wordwrap", "xmlattr", "zfill"),
}
_BITS = 4096  # of whole numbers
_NESTED = re.compile(r"\{[^}]*\{")  # a format that takes widths from what it is given


class TemplateLimitError(UserError):
    """A template has been stopped: it, and no record, is at fault."""


class LimitedSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment whose templates have to be made by `compiled`; `begin` starts a rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """filters: beside Jinja's own, or instead of them. options: as Jinja's environment."""
        super().__init__(**options, finalize=self._output)
        self.begin()
        self.filters |= filters
        self.globals |= {"_step": self._step, "_concat": self._concat}
        # It makes texts of any length, and has no use here.
        del self.globals["lipsum"]
        for name, function in self.filters.items():
            self.filters[name] = self._limited(name, function)

    def begin(self) -> None:
        """Count from nothing."""
        self._steps = self._made = 0
        self._started = time.thread_time()

    def compiled(self, tree: jinja2.nodes.Template) -> jinja2.Template:
        """A template of a parsed source, in which loops and `~` are counted as well."""
        code = self.compile(_Count().visit(tree))
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._check(function.__name__, (owner, *args, *kwargs.values()))
        value = super().call(context, function, *args, **kwargs)
        return self._counted(value) if isinstance(owner, str) else value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "+":
            self._make(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            self._make(len(left) + _widths(left, right) + _size(right))
        elif operator == "*":
            self._make(max(_size(left), 1) * max(_size(right), 1) * max(_count(left), _count(right), 1))
            self._bits(left, 1)
            self._bits(right, 1)
        elif operator == "**":
            self._bits(left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # `translate` makes of each character whatever its table says.
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr == "translate")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            given = (*args, *kwargs.values()) if _NESTED.search(value.__self__) else ()
            self._make(_widths(value.__self__, ()) + sum(_count(width) for width in given))
            return str(self._counted(format_safely(*args, **kwargs)))

        return limited

    def _step(self) -> str:
        self._steps += 1
        if self._steps > STEPS:
            raise TemplateLimitError(f"takes more than {STEPS:,} turns of loops and calls for one conversation")
        if time.thread_time() - self._started > SECONDS:
            raise TemplateLimitError(f"takes more than {SECONDS:g} s for one conversation")
        return ""

    def _make(self, size: int) -> None:
        self._made += size
        if self._made > MADE:
            raise TemplateLimitError(f"makes more than {MADE:,} characters for one conversation")

    def _bits(self, number: Any, times: Any) -> None:
        if isinstance(number, int) and isinstance(times, int) and number.bit_length() * max(times, 1) > _BITS:
            raise TemplateLimitError(f"computes with numbers of more than {_BITS:,} bits")

    def _counted(self, value: Any) -> Any:
        self._make(_size(value))
        return value

    def _output(self, value: Any) -> Any:
        """What Jinja calls with each value before it is written."""
        self._make(_size(value))
        return value

    def _concat(self, *parts: Any) -> str:
        self._make(sum(_size(part) for part in parts))
        return "".join(map(str, parts))

    def _check(self, name: str, values: Sequence[Any]) -> None:
        """Raise for what would make too much of its arguments, of which the first is a method's or filter's own."""
        own, *others = values
        if name == "replace" and len(others) > 1 and all(isinstance(text, str) for text in (own, *others[:2])):
            self._make(len(own) + own.count(others[0]) * len(others[1]))
        elif name in _GROWING:
            widest = max((_size(other) + _count(other) for other in others), default=0)
            self._make(max(_size(own), 1) * max(widest, 1) + (_widths(own, ()) if isinstance(own, str) else 0))

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        given_first = int(getattr(function, "jinja_pass_arg", None) is not None)

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._step()
            self._check(name, (*args[given_first:], *kwargs.values()))
            return self._counted(function(*args, **kwargs))

        return limited


class _Count(jinja2.visitor.NodeTransformer):
    """Each turn of a loop makes a call, and so does each `~`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.Output([_call("_step", [])]))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("_concat", node.nodes)


def _call(name: str, args: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
    return jinja2.nodes.Call(jinja2.nodes.Name(name, "load"), args, [], None, None)


def _size(value: Any, depth: int = 6) -> int:
    """Characters of a text, and of all texts in a list or dict, whose items count as well."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple | dict) and depth:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return len(items) + sum(_size(item, depth - 1) for item in items)
    return 0


def _count(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _widths(pattern: str, values: Any) -> int:
    """All that a format may pad to: the numbers in it, and those given where it takes widths from there."""
    given = values if isinstance(values, tuple) else (values,)
    return sum(int(number[:9]) for number in re.findall(r"\d+", pattern)) + (
        sum(_count(value) for value in given) if "*" in pattern else 0
    )
