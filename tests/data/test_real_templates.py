"""Chat templates as models were published with: the text that transformers gives, and the responses alone learnt."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import jinja2
import numpy as np
import pytest
from real_files import data_folder, template_folder, tokenizer_folder
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxtune.config import DataConfig
from jaxtune.data.builtin_templates import builtin_template
from jaxtune.data.chat import ChatRenderer
from jaxtune.data.dataset import build
from jaxtune.data.forms import Chat
from jaxtune.data.templates import ChatTemplate
from jaxtune.errors import UserError

TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TWO_EXCHANGES = [user("Good day"), assistant("First reply."), user("And\nthen?"), assistant("  second reply  \n")]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "two exchanges": (TWO_EXCHANGES, None),
    "system": ([{"role": "system", "content": "Be brief."}, *TWO_EXCHANGES], None),
    # Under both of the names by which templates know it, as records are read.
    "reasoning": (
        [
            user("1+1?"),
            assistant("Two.", reasoning_content="easy", thinking="easy"),
            user("2+2?"),
            assistant("4", reasoning_content="hard", thinking="hard"),
        ],
        None,
    ),
    "tools": (
        [
            user("How is Oslo?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "sunny", "tool_call_id": CALL["id"], "name": "weather"},
            assistant("It is sunny."),
        ],
        [{"type": "function", "function": TOOL}],
    ),
}
# Those that end the assistant's turn with nothing, or with what begins the next turn.
NO_END = {
    "Apertus-8B-Instruct",
    "Apriel-1.6-15b-Thinker-fixed",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "NVIDIA-Nemotron-Nano-v2",
    "Reka-Edge",
    "llama-cpp-rwkv-world",
    "tencent-Hy3",
}
ORIGINALS = {
    "llama-3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "qwen-2.5": "Qwen-Qwen2.5-7B-Instruct",
    "qwen-3": "Qwen-Qwen3-0.6B",
    "phi-3": "microsoft-Phi-3.5-mini-instruct",
    "gemma": "google-gemma-2-2b-it",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
}
REFUSALS = (jinja2.TemplateError, TypeError, ValueError)


def sources() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(template_folder().glob("*.jinja"))}


def rendered(render: Callable[[], str]) -> str | None:
    """The text, or None for a conversation that is refused."""
    try:
        return render()
    except REFUSALS:
        return None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_is_that_of_transformers(name: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder("llama3_1"))
    messages, tools = CONVERSATIONS[name]
    written = 0
    for family, source in sources().items():
        template = ChatTemplate(source, tokenizer.special_tokens_map, datetime.date.today())
        for prompt in (False, True):
            ours = rendered(lambda: template.render(messages, tools, add_generation_prompt=prompt).text)  # noqa: B023
            theirs = rendered(
                lambda: tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt  # noqa: B023
                )
            )  # fmt: skip
            assert ours == theirs, family
            written += ours is not None
    assert written >= 2 * 50


def test_only_responses_and_their_ends_are_learnt() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder("llama3_1"))
    replies = [message["content"].strip() for message in TWO_EXCHANGES if message["role"] == "assistant"]
    told, reasons = 0, {}
    for family, source in sources().items():
        tokenizer.chat_template = source
        try:
            renderer = ChatRenderer(tokenizer, DataConfig(train="-"))
            text, spans, _ = renderer.render(Chat(TWO_EXCHANGES, [None] * 4), "-")
        except UserError as error:
            reasons[family] = str(error)
            continue
        told += 1
        learnt = [text[start:stop] for start, stop, _ in spans]
        assert len(learnt) == 2, family
        for reply, other, piece in zip(replies, replies[::-1], learnt):
            before, found, after = piece.partition(reply)
            assert found, family
            assert after.strip(), family  # the end of the turn
            assert not any(word in piece for word in ("Good day", "then?", other)), family
            # What a template says itself of what the model writes may have the header in it.
            assert renderer.template.has_generation_blocks or "assistant" not in before, family
    assert {family for family, reason in reasons.items() if "end-of-turn marker" in reason} == NO_END
    # The rest are for conversations with tools alone, or ask for variables of their own.
    assert all("trying the chat template" in reasons[family] for family in reasons.keys() - NO_END)
    assert told >= 50


@pytest.mark.parametrize(("builtin", "original"), ORIGINALS.items())
def test_built_in_templates_are_the_published_ones(builtin: str, original: str) -> None:
    """Where a published one would leave out a turn without a word, the built-in one refuses."""
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    day = datetime.date(2024, 7, 26)
    ours = ChatTemplate(builtin_template(builtin), variables, day)
    theirs = ChatTemplate(sources()[original], variables, day)
    same = 0
    for messages, tools in CONVERSATIONS.values():
        texts = [rendered(lambda: template.render(messages, tools).text) for template in (ours, theirs)]  # noqa: B023
        same += texts[0] == texts[1] != None  # noqa: E711
        assert texts[0] in (texts[1], None)
        if texts[0] is None and texts[1] is not None:
            assert "weather" not in texts[1]
    assert same >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer_name", "template", "end"),
    [
        ("smollm2", None, "<|im_end|>"),
        ("qwen3", "Qwen-Qwen3-0.6B", "<|im_end|>"),
        ("llama3_1", "meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>"),
        ("gemma3", None, "<end_of_turn>"),
        ("llama2", "mistralai-Mistral-Nemo-Instruct-2407", "</s>"),
    ],
)
def test_tokens_are_those_of_transformers(
    tokenizer_name: str, template: str | None, end: str, smollm2: PreTrainedTokenizerBase
) -> None:
    """Real records with real tokenizers: every token, and the responses decoded from what is learnt."""
    tokenizer = smollm2
    if tokenizer_name != "smollm2":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder(tokenizer_name))
    if template is not None:
        tokenizer.chat_template = sources()[template]
    records: list[dict[str, Any]] = []
    for file in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
        records += json.loads((data_folder() / file).read_text(encoding="utf-8"))[:150]
    # Whatever a template that asks for the day is given.
    today = datetime.date.today().isoformat()
    config = DataConfig(train="-", max_length=8192, packing=False, shuffle=False, template_date=today)
    data = build(config, tokenizer, records=records)
    assert len(data.documents) == len(records)
    for index, record in enumerate(records):
        document = data.documents[index]
        question = record["instruction"] + (f"\n\n{record['input']}" if record["input"] else "")
        messages = [user(question), assistant(record["output"])]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert document.tokens.tolist() == whole, index
        learnt = np.flatnonzero(document.weights)
        assert np.array_equal(learnt, np.arange(learnt[0], learnt[-1] + 1)), index
        text = str(tokenizer.decode(document.tokens[learnt]))
        reply, found, rest = text.rpartition(end)
        assert found, index
        assert not rest.strip(), index
        # A template may write a place for reasoning first; a tokenizer that does not know [/INST] as one token may
        # join its end with the first character.
        before = "<think>\n\n</think>\n\n" if "qwen" in tokenizer_name else "]" if tokenizer_name == "llama2" else ""
        assert reply.removeprefix(before).strip() == record["output"].strip(), index
