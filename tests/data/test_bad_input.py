"""What is wrong with a record is said with place, rule and remedy; or the record is passed over and counted."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from jaxtune.config import DataConfig
from jaxtune.data.dataset import build
from jaxtune.data.encoding import LONGEST
from jaxtune.errors import UserError

# Refuses what a real template may refuse, and computes with what is not there.
CHATML = (
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not in this house') }}{% endif %}"
    "{% if 'absent' in m.content %}{{ m.absent.more }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "a", "output": "b"},
    "messages": {"messages": [ASK, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a b"},
    "tokens": {"input_ids": [5, 6, 7]},
}


def turns(*added: Any) -> dict[str, Any]:
    return {"messages": [*added]}


# Form, the bad record (as bytes: a line of the file), and what is said of it.
TABLE: dict[str, tuple[str, dict[str, Any] | bytes, str]] = {
    "missing column": ("instruction", {"instruction": "a"}, "output is missing (it has instruction)"),
    "another form": ("instruction", GOOD["messages"], "instruction is missing (it has messages)"),
    "another form, messages": ("messages", GOOD["instruction"], "messages must be a list of turns"),
    "empty object": ("text", {}, "text is missing (it is empty)"),
    "null": (
        "completion",
        {"prompt": "a", "completion": None},
        "completion must be a text that is not blank, not None",
    ),
    "empty": ("instruction", {"instruction": "a", "output": ""}, "output must be a text that is not blank, not ''"),
    "number for text": ("text", {"text": 7}, "text must be a text that is not blank, not 7"),
    "content of another kind": ("messages", turns(ASK, ANSWER | {"content": 7}), "turn 2: content must be a text"),
    "picture": ("messages", turns(ASK | {"content": [{"type": "image"}]}, ANSWER), "turn 1: content has a part that"),
    "a weight beyond all": ("messages", turns(ASK, ANSWER | {"weight": 1e308}), "a number from 0 to 1,000,000, not"),
    "a field twice": ("text", b'{"text": "a", "text": "b"}', "the field 'text' is given twice"),
    "unknown role": (
        "sharegpt",
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "turn 1: role must be one of",
    ),
    "no role": ("messages", turns({"content": "a"}), "turn 1: role must be one of"),
    "no turn": ("messages", turns(), "messages must be a list of turns"),
    "turns of another kind": ("messages", turns("a", "b"), "turn 1: a turn must have role and content"),
    "template refuses": ("messages", turns(ASK, ANSWER | {"content": "forbidden"}), "not in this house"),
    "template fails": ("messages", turns(ASK, ANSWER | {"content": "absent"}), "the chat template refuses the turns"),
    "tokens of another vocabulary": ("tokens", {"input_ids": [5, 10**9]}, "input_ids has 1000000000"),
    "labels of another length": ("tokens", {"input_ids": [5], "labels": [5, 5]}, "labels must repeat input_ids"),
    "no object": ("text", b'["a"]', "it must be an object with named fields"),
    "broken UTF-8": ("text", b'{"text": "\xe9"}', "line 2 is not UTF-8 (byte 0xe9"),
    "line cut short": ("text", b'{"text": "a', "line 2 is no valid JSON"),
    "half of a character": ("text", b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    "far too long": ("text", {"text": "a" * (LONGEST + 1)}, f"no record may have more than {LONGEST:,}"),
    "deeply nested": ("text", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2 is no valid JSON"),
}


@pytest.mark.parametrize(("form", "bad", "said"), TABLE.values(), ids=TABLE)
def test_bad_record_is_named_or_counted(
    form: Any,
    bad: dict[str, Any] | bytes,
    said: str,
    tmp_path: pathlib.Path,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    path, tokenizer = tmp_path / "data.jsonl", make_tokenizer(CHATML)
    good = json.dumps(GOOD[form]).encode()
    path.write_bytes(b"\n".join([good, bad if isinstance(bad, bytes) else json.dumps(bad).encode(), good, b""]))
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        build(DataConfig(train=str(path), form=form), tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}, record 2")
    assert said in message
    assert message.endswith("(data.on_bad_record: skip passes over such records)")
    assert len(message) < 1500

    data = build(DataConfig(train=str(path), form=form, on_bad_record="skip"), tokenizer)
    assert (data.statistics.records, data.statistics.bad, data.statistics.documents) == (3, 1, 2)
    assert data.documents.records.tolist() == [1, 3]
    (example,) = data.sources[0].tally.examples
    assert message.startswith(example)
    assert time.perf_counter() - started < 20


def test_a_null_of_arrow_is_a_missing_field(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    """Tables have a column for every field of any record; where a record has none, the place holds a null."""
    records = datasets.Dataset.from_list([GOOD["instruction"] | {"input": "c"}, GOOD["instruction"], {"output": "b"}])
    config = DataConfig(train="-", on_bad_record="skip")
    data = build(config, make_tokenizer(CHATML), records=records)
    assert (data.statistics.documents, data.statistics.bad) == (2, 1)
    assert "record 3: instruction is missing (it has output)" in data.sources[0].tally.examples[0]
