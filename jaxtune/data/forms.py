"""The forms that records come in, and each form's way to one of three: a conversation, a text, or tokens."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtune.config import DataConfig
from jaxtune.errors import UserError, shown

Form = Literal["instruction", "messages", "sharegpt", "completion", "text", "tokens", "format"]
Message = dict[str, Any]

_USER, _ASSISTANT, _TOOL = "user", "assistant", "tool"
# Names of roles in files, and what chat templates call them. A `function_call` is a turn of the assistant's.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": _USER,
    "human": _USER,
    "assistant": _ASSISTANT,
    "gpt": _ASSISTANT,
    "model": _ASSISTANT,
    "function_call": _ASSISTANT,
    "tool": _TOOL,
    "observation": _TOOL,
    "function": _TOOL,
    "function_response": _TOOL,
    "ipython": _TOOL,
}
_CONTENT, _WEIGHT = ("content", "value"), ("weight", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_KEYS = {"role", "from", "tool_calls", "function_call", "tool_call_id", "name", *_CONTENT, *_WEIGHT, *_REASONING}

_HEAVIEST = 1_000_000  # of a turn's weights; beyond, sums in float32 would lose the others
_COLUMNS = 30  # that a message names

# Columns that say that records are for something else than learning a text.
_OTHER_USES = {
    "chosen": "pairs of a better and a worse answer",
    "rejected": "pairs of a better and a worse answer",
    "chosen_messages": "pairs of a better and a worse answer",
    "images": "pictures",
    "image": "pictures",
    "audios": "sounds",
    "videos": "films",
}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation for a chat template. weights: each message's weight in the loss, or None for the usual one."""

    messages: list[Message]
    weights: list[float | None]
    tools: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as it is, to which only the tokenizer's own special tokens are added. prompt: not learnt; may be empty."""

    prompt: str
    response: str


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids, and each one's weight in the loss."""

    ids: list[int]
    weights: list[float]


def needed_columns(config: DataConfig) -> dict[Form, set[str]]:
    """The columns without which a record is not of the form."""
    return {
        "instruction": {"instruction", "output"},
        "messages": {"messages"},
        "sharegpt": {"conversations"},
        "completion": {"prompt", "completion"},
        "text": {config.text_field},
        "tokens": {"input_ids"},
        "format": format_columns(config),
    }


def format_columns(config: DataConfig) -> set[str]:
    """The columns that `data.prompt_format` and `data.response_format` name."""
    text = (config.prompt_format or "") + (config.response_format or "")
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def detect_form(columns: Sequence[str], config: DataConfig, name: str) -> Form:
    """The form stated in the configuration, or the one form whose columns are all there.

    name: the data's, for errors.

    Raises:
        UserError: a column of the stated form is missing; no form fits, or more than one; or the columns are those of
            data for another purpose, such as preferences or pictures.
    """
    needed = needed_columns(config)
    more = f" and {len(columns) - _COLUMNS} more" if len(columns) > _COLUMNS else ""
    found = f"{name} has the columns {', '.join(columns[:_COLUMNS]) or '(none)'}{more}"
    stated: Form | None = "format" if config.response_format is not None else None
    if config.form != "auto":
        stated = config.form
    if stated is not None:
        if missing := needed[stated] - set(columns):
            raise UserError(
                f"{found}; data.form {stated} also needs {', '.join(sorted(missing))}: rename a column, or set "
                "data.form (and for text data.text_field) to what is there"
            )
        return stated
    if other := [column for column in columns if column in _OTHER_USES]:
        raise UserError(
            f"{found}, and {other[0]} are {_OTHER_USES[other[0]]}, from which this does not learn; to learn the rest "
            "of each record alone, state data.form"
        )
    fitting = [form for form, names in needed.items() if names and names <= set(columns)]
    if "messages" in fitting and "label" in columns:
        raise UserError(f"{found}, and label may mark answers to avoid; to learn all, set data.form to messages")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{found}, which fit more than one form; set data.form to one of {', '.join(fitting)}")
    rules = "; ".join(f"{form} needs {' and '.join(sorted(names))}" for form, names in needed.items() if names)
    raise UserError(
        f"{found}, which fit no form ({rules}); rename the columns, or set data.text_field, or data.response_format"
    )


def read_record(record: Mapping[str, Any], form: Form, config: DataConfig, at: str) -> Chat | Text | Tokens:
    """One record of a form, checked. at: its place, for errors.

    Raises:
        UserError: whatever is wrong with it.
    """
    if form == "text":
        return Text("", _string(record, config.text_field, at))
    if form == "format":
        return _formatted(record, config, at)
    if form == "tokens":
        return _tokens(record, at)
    if form == "completion":
        return _completion(record, at)
    if form == "instruction":
        return _instruction(record, at)
    turns = record.get("messages" if form == "messages" else "conversations")
    messages, weights = _conversation(turns, "messages" if form == "messages" else "conversations", at)
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": _string(record, "system", at)})
        weights.insert(0, None)
    return Chat(messages, weights, _tools(record.get("tools"), at))


def _string(record: Mapping[str, Any], key: str, at: str) -> str:
    """A field that must be a text with something in it."""
    value = record.get(key)
    if value is None and key not in record:
        has = f"it has {', '.join(map(str, record))}" if record else "it is empty"
        raise UserError(f"{at}: {key} is missing ({has}); correct or remove the record")
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{at}: {key} must be a text that is not blank, not {shown(value)}; correct or remove the record"
        )
    return value


def _instruction(record: Mapping[str, Any], at: str) -> Chat:
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _string(record, "system", at)})
    history = record.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise UserError(f"{at}: history must be a list of pairs [question, answer], not {shown(history)}; correct it")
    for pair in history:
        exchange = dict(zip(("question", "answer"), pair))
        messages.append({"role": _USER, "content": _string(exchange, "question", f"{at}, history")})
        messages.append({"role": _ASSISTANT, "content": _string(exchange, "answer", f"{at}, history")})
    question = _string(record, "instruction", at)
    if record.get("input") not in (None, ""):
        question += "\n\n" + _string(record, "input", at)
    messages.append({"role": _USER, "content": question})
    messages.append({"role": _ASSISTANT, "content": _string(record, "output", at)})
    return Chat(messages, [None] * len(messages))


def _completion(record: Mapping[str, Any], at: str) -> Chat | Text:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before, _ = _conversation(prompt, "prompt", at)
        after, weights = _conversation(completion, "completion", at)
        # The prompt's own answers are given, not learnt.
        given: list[float | None] = [0.0] * len(before)
        return Chat(before + after, given + weights, _tools(record.get("tools"), at))
    return Text(_string(record, "prompt", at), _string(record, "completion", at))


def _formatted(record: Mapping[str, Any], config: DataConfig, at: str) -> Text:
    for column in format_columns(config):
        if record.get(column) is None:
            raise UserError(f"{at}: {column}, which the format names, is missing; correct or remove the record")
        if not isinstance(record[column], str | int | float):
            raise UserError(f"{at}: {column} must be a text, not {shown(record[column])}; correct or remove the record")
    response = (config.response_format or "").format_map(record)
    return Text((config.prompt_format or "").format_map(record), _string({"the text": response}, "the text", at))


def _tokens(record: Mapping[str, Any], at: str) -> Tokens:
    ids: Any = record.get("input_ids")
    labels: Any = record.get("labels")
    for key, values in (("input_ids", ids), ("labels", ids if labels is None else labels)):
        # bool is an int to Python, but no token.
        if not (isinstance(values, list) and values and all(type(value) is int for value in values)):
            raise UserError(f"{at}: {key} must be a list of whole numbers, not {shown(values)}; correct it")
    if labels is None:
        return Tokens(ids, [1.0] * len(ids))
    if len(labels) != len(ids) or any(label not in (token, -100) for label, token in zip(labels, ids)):
        raise UserError(f"{at}: labels must repeat input_ids, with -100 where nothing is learnt; correct them")
    return Tokens(ids, [float(label != -100) for label in labels])


def _conversation(turns: object, key: str, at: str) -> tuple[list[Message], list[float | None]]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{at}: {key} must be a list of turns with role and content, not {shown(turns)}; correct it")
    messages: list[Message] = []
    weights: list[float | None] = []
    calls: list[dict[str, Any]] = []  # made, and not answered yet
    count = 0
    for number, turn in enumerate(turns, 1):
        place = f"{at}, turn {number}"
        message, weight = _turn(turn, place)
        for call in message.get("tool_calls", ()):
            count += 1
            # Some templates insist on nine letters and digits.
            call.setdefault("id", f"call{count:05d}")
            calls.append(call)
        if message["role"] == _TOOL:
            _answer(message, calls)
        messages.append(message)
        weights.append(weight)
    return messages, weights


def _answer(message: Message, calls: list[dict[str, Any]]) -> None:
    """Say in a tool's message which call it answers: the one it names, or the first that is open."""
    wanted = message.get("tool_call_id")
    call = next((call for call in calls if wanted in (None, call["id"])), None)
    if call is not None:
        calls.remove(call)
        message.setdefault("tool_call_id", call["id"])
        message.setdefault("name", call["function"]["name"])


def _turn(turn: object, at: str) -> tuple[Message, float | None]:
    if not isinstance(turn, dict):
        raise UserError(f"{at}: a turn must have role and content, not be {shown(turn)}; correct or remove the record")
    # What holds nothing says nothing.
    turn = {key: value for key, value in turn.items() if value is not None and value != []}
    role_name = turn.get("role", turn.get("from"))
    role = ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise UserError(f"{at}: role must be one of {', '.join(ROLES)}, not {shown(role_name)}; rename it")
    # Ignoring one of these would train on something else than the file says.
    if other := sorted(str(key) for key in turn.keys() - _KEYS):
        known = ", ".join(sorted(_KEYS))
        raise UserError(f"{at}: a turn cannot have {', '.join(other)}; remove the keys (known: {known})")
    for same in (("role", "from"), _CONTENT, _WEIGHT, _REASONING, ("tool_calls", "function_call")):
        if len(given := [key for key in same if key in turn]) > 1:
            raise UserError(f"{at}: {' and '.join(given)} mean the same; keep one of them")

    content = next((turn[key] for key in _CONTENT if key in turn), "")
    reasoning = next((turn[key] for key in _REASONING if key in turn), "")
    calls = turn.get("tool_calls", turn.get("function_call", []))
    if isinstance(content, list):
        content, reasoning, calls = _parts(content, reasoning, calls, at)
    if role_name == "function_call":
        content, calls = "", content
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise UserError(f"{at}: content must be a text that is not blank, not {shown(content)}; correct it")
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = _calls(calls, at)
    if reasoning:
        # Templates know it by different names.
        message |= {"reasoning_content": reasoning, "thinking": reasoning}
    if not content.strip() and role != _TOOL and not (role == _ASSISTANT and len(message) > 2):
        raise UserError(f"{at}: content must be a text that is not blank, not {shown(content)}; correct or remove it")
    message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return message, _weight(turn, at)


def _weight(turn: Mapping[str, Any], at: str) -> float | None:
    weight = next((turn[key] for key in _WEIGHT if key in turn), None)
    if weight is None:
        return None
    if not isinstance(weight, int | float) or not 0 <= weight <= _HEAVIEST:
        raise UserError(
            f"{at}: a turn's weight in the loss must be a number from 0 to {_HEAVIEST:,}, not {shown(weight)}; correct "
            "it"
        )
    return float(weight)


def _parts(parts: list[Any], reasoning: str, calls: Any, at: str) -> tuple[str, str, Any]:
    """Content in parts, {"type": "text", "text": ...}: its text, its reasoning and its tool calls."""
    texts: list[str] = []
    calls = list(calls) if isinstance(calls, list) else [calls]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "reasoning", "tool_call"):
            raise UserError(f"{at}: content has a part that is no text: {shown(part)}; remove the record")
        value = part.get(kind, part.get("value"))
        if not isinstance(value, str):
            raise UserError(f"{at}: a part of the content must hold a text, not {shown(value)}; correct it")
        if kind == "text":
            texts.append(value)
        elif kind == "reasoning":
            reasoning += value
        else:
            calls.append(value)
    return "".join(texts), reasoning, calls


def _calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Calls of tools, {"type": "function", "function": {"name", "arguments"}}, from any of the usual spellings."""
    calls = _from_json(calls, "tool_calls", at)
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = _from_json(call, "a tool call", at)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{at}: a tool call must have a name and arguments, not be {shown(call)}; correct it")
        arguments = _from_json(function.get("arguments") or {}, "the arguments of a tool call", at)
        if not isinstance(arguments, dict):
            raise UserError(f"{at}: the arguments of a tool call must be an object, not {shown(arguments)}")
        one: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str) and call["id"]:
            one["id"] = call["id"]
        made.append(one)
    return made


def _tools(tools: Any, at: str) -> list[dict[str, Any]] | None:
    """The tools on offer, {"type": "function", "function": {...}}; None where there are none."""
    tools = _from_json(tools, "tools", at) if tools else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f"{at}: tools must be a list, not {shown(tools)}; correct it")
    made = []
    for tool in tools:
        tool = _from_json(tool, "a tool", at)
        if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
            raise UserError(f"{at}: a tool must be an object, not {shown(tool)}; correct it")
        made.append(tool if "function" in tool else {"type": "function", "function": tool})
    return made


def _from_json(value: Any, what: str, at: str) -> Any:
    """The value itself, or where it is a text what that says in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at}: {what} must be JSON ({error}), not {shown(value)}; correct it") from error
