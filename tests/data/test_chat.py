"""Token ids and masks, judged by decoding what is learnt: exactly the responses and their end of turn."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxtune.config import DataConfig
from jaxtune.data.builtin_templates import TEMPLATES
from jaxtune.data.documents import Document
from jaxtune.data.encoding import Encoder, Tally, tokens_in
from jaxtune.data.sources import from_memory
from jaxtune.errors import UserError

BOS, END = "<s>", "<|im_end|>"

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nothing but the blocks says where the assistant speaks: there is no generation prompt.
BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
)
# Trims content, puts a space before the response, and nothing after it but the end of sequence.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
# Writes an empty thought before the last response only.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNT = 1000  # records that are tokenised in one call
WORDS = ["the", "cat", "sät", "in\n\n", "   ", "日本", "🙂", "12,5", "\tif x:\n        y()", "<s", "!"]


def encode_all(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, form: Any = "messages", **settings: Any
) -> list[Document]:
    config = DataConfig(train="file.jsonl", **settings)
    return list(Encoder(tokenizer, config).encode(from_memory(records), form, Tally()))


def learnt_runs(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each unbroken run of learnt tokens."""
    edges = np.flatnonzero(np.diff(document.weights > 0, prepend=False, append=False)).tolist()
    return [tokenizer.decode(document.tokens[a:b]) for a, b in list(pairwise(edges))[::2]]


def random_conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    rng = np.random.default_rng(seed)

    def text() -> str:
        # White space at the start could share a token with the template's line break.
        return "so" + "".join(rng.choice(WORDS, size=rng.integers(1, 9))) + " end"

    return [
        [{"role": role, "content": text()} for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
        for _ in range(count)
    ]


@pytest.mark.parametrize("template", [CHATML, BLOCKS, INST, THINK], ids=["chatml", "blocks", "inst", "think"])
def test_exactly_the_responses_and_ends_of_turn_are_learnt(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], template: str
) -> None:
    tokenizer = make_tokenizer(template)
    conversations = random_conversations(60, seed=1)
    if template != INST:
        conversations[0].insert(0, {"role": "system", "content": "Be brief."})
    documents = encode_all([{"messages": turns} for turns in conversations], tokenizer)
    for document, turns in zip(documents, conversations, strict=True):
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert tokenizer.decode(document.tokens) == text
        assert document.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        replies = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if template == THINK:
            # The model has to write the thought too, as no generation prompt does.
            replies[-1] = "<think>\n\n</think>\n\n" + replies[-1]
        if template == INST:
            # The space that the template puts first belongs to the first token, unless that token holds none.
            assert [run.strip() for run in learnt_runs(document, tokenizer)] == [r.strip() + END for r in replies]
        else:
            assert learnt_runs(document, tokenizer) == [reply + END for reply in replies]


def test_white_space_at_the_ends_of_a_response_is_learnt_or_trimmed_with_the_template(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "the cat \n\n   "}]
    for template, reply in [(CHATML, "the cat \n\n   "), (BLOCKS, "the cat \n\n   "), (INST, " the cat")]:
        tokenizer = make_tokenizer(template)
        (document,) = encode_all([{"messages": turns}], tokenizer)
        assert learnt_runs(document, tokenizer) == [reply + END]


def test_instruction_records_become_two_turns(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer(CHATML)
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": None, "output": "la"},
        {"instruction": "Sing.", "input": "", "output": "la"},
    ]
    documents = encode_all(records, tokenizer, "instruction")
    asked = ["Add.\n\n1 2", "Sing.", "Sing."]
    for document, question, record in zip(documents, asked, records, strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
        assert tokenizer.decode(document.tokens) == tokenizer.apply_chat_template(turns, tokenize=False)
        assert learnt_runs(document, tokenizer) == [record["output"] + END]


def test_special_tokens_are_written_once(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer(CHATML)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    (document,) = encode_all([{"messages": random_conversations(1, seed=2)[0]}], tokenizer)
    assert document.tokens[:2].tolist() == tokenizer.convert_tokens_to_ids([BOS, "<|im_start|>"])


@pytest.mark.parametrize("template", [CHATML, BLOCKS])
def test_all_learns_every_token_but_the_first(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], template: str
) -> None:
    turns = random_conversations(1, seed=3)[0]
    (document,) = encode_all([{"messages": turns}], make_tokenizer(template), train_on="all")
    assert document.weights.tolist() == [0.0] + [1.0] * (len(document.tokens) - 1)


def test_text_gets_the_tokenizers_own_ends(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    texts = ["the cat", f"sat{END}"] * (COUNT // 2) + ["last"]
    documents = encode_all([{"text": text} for text in texts], tokenizer, "text")
    assert len(documents) == COUNT + 1
    for document, text in zip(documents, texts, strict=True):
        assert tokenizer.decode(document.tokens) == BOS + text.removesuffix(END) + END
        assert document.weights[0] == 0
        assert document.weights[1:].all()
    endless = make_tokenizer(eos_token=None)
    (document,) = encode_all([{"text": "the cat"}], endless, "text")
    assert endless.decode(document.tokens) == f"{BOS}the cat"


def test_tokenizer_is_left_as_it_was(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer(CHATML)
    before = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), tokenizer.padding_side
    encode_all([{"messages": turns} for turns in random_conversations(3, seed=4)], tokenizer)
    encode_all([{"text": "a"}], tokenizer, "text")
    assert before == (
        tokenizer.backend_tokenizer.to_str(),
        dict(tokenizer.special_tokens_map),
        tokenizer.padding_side,
    )
    assert tokenizer.pad_token is None


def test_offsets_trimmed_to_nothing_still_place_their_token() -> None:
    # "ab", white space trimmed to an empty range, "c" less its leading space, one character in two tokens.
    offsets = np.array([[0, 2], [5, 5], [6, 7], [7, 8], [7, 8], [8, 9]])
    assert tokens_in(offsets, (3, 5)).tolist() == [False, True, False, False, False, False]
    assert tokens_in(offsets, (7, 8)).tolist() == [False, False, False, True, True, False]
    assert tokens_in(offsets, (5, 6)).tolist() == [False, False, True, False, False, False]
    assert tokens_in(np.zeros((0, 2), np.int64), (0, 1)).tolist() == []


def test_real_tokenizer_learns_the_responses(smollm2: PreTrainedTokenizerBase) -> None:
    conversations = random_conversations(40, seed=5)
    documents = encode_all([{"messages": turns} for turns in conversations], smollm2)
    for document, turns in zip(documents, conversations, strict=True):
        assert smollm2.decode(document.tokens) == smollm2.apply_chat_template(turns, tokenize=False)
        replies = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
        assert learnt_runs(document, smollm2) == replies


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("text", {"text": None}, "text must be a text that is not blank, not None"),
        ("text", {"text": 7}, "text must be"),
        ("instruction", {"instruction": " ", "output": "b"}, "instruction must be"),
        ("instruction", {"instruction": "a", "output": ""}, "output must be a text that is not blank"),
        ("instruction", {"instruction": "a", "input": 3, "output": "b"}, "input must be"),
        ("messages", {"messages": []}, "messages must be a list of turns"),
        ("messages", {"messages": "hello"}, "messages must be a list of turns"),
        ("messages", {"messages": ["hello"]}, "turn 1: a turn must have role and content"),
        ("messages", {"messages": [ASK, ANSWER | {"content": None}]}, "turn 2: content must be"),
        ("messages", {"messages": [ASK, ANSWER | {"content": " \n"}]}, "turn 2: content must be"),
        ("messages", {"messages": [ASK, {"role": "bot", "content": "b"}]}, "turn 2: role must be one of .* not 'bot'"),
        ("messages", {"messages": [ASK, ANSWER | {"tool_calls": "f()"}]}, "turn 2: tool_calls must be JSON"),
        ("messages", {"messages": [ASK, ANSWER | {"mood": "glad"}]}, "turn 2: a turn cannot have mood; remove"),
        ("messages", {"messages": [ASK, ANSWER | {"content": f"b{END}c"}]}, "remove that marker from the content"),
    ],
)
def test_bad_records_are_named(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], form: Any, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^the records given, record 1.*{message}"):
        encode_all([record], make_tokenizer(CHATML), form)


def test_record_numbers_count_from_one_over_all_records(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    records = [{"text": "a"}] * COUNT + [{"text": "b"}, {"text": " "}]
    with pytest.raises(UserError, match=rf"record {COUNT + 2}:"):
        encode_all(records, make_tokenizer(), "text")


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, [ASK, ANSWER], "no chat template.*use the instruct version"),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            [ASK, ANSWER],
            "not write an assistant's content and then an end",
        ),
        (INST, [{"role": "system", "content": "s"}, ASK, ANSWER], "refuses the turns.*only user and assistant turns"),
        (
            "{% for t in tools %}{% endfor %}" + CHATML,
            [ASK, ANSWER],
            "trying the chat template: .* use another template",
        ),
        (
            CHATML.replace("m.content }}", "m.content | upper }}"),
            [ASK, ANSWER],
            "not write an assistant's content and then an end",
        ),
    ],
)
def test_templates_that_cannot_serve_are_refused(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    template: str | None,
    turns: list[dict[str, str]],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        encode_all([{"messages": turns}], make_tokenizer(template))


def test_templates_that_write_a_turn_in_view_of_others_still_say_where_it_is(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    turns = [ASK, ANSWER, {"role": "user", "content": "c"}, {"role": "assistant", "content": "pizza"}]
    for template in (
        "{{ messages | length }}" + CHATML,
        # From the last message on, and looking ahead in a loop of its own.
        CHATML.replace("{{ m.content }}", "{% for n in messages[1:] %}{% set x = n %}{% endfor %}{{ m.content }}"),
    ):
        tokenizer = make_tokenizer(template)
        (document,) = encode_all([{"messages": turns}], tokenizer)
        assert learnt_runs(document, tokenizer) == ["b" + END, "pizza" + END]


def test_text_that_a_template_changes_is_counted(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer(CHATML.replace("m.content }}", "m.content | replace('z', '') }}"))
    records = [{"messages": [ASK, ANSWER | {"content": content}]} for content in ("pizza", "pasta")]
    tally = Tally()
    first, _ = Encoder(tokenizer, DataConfig(train="x")).encode(from_memory(records), "messages", tally)
    assert learnt_runs(first, tokenizer) == ["pia" + END]
    assert (tally.records, tally.altered) == (2, 1)


@pytest.mark.parametrize(("name", "special"), TEMPLATES.items())
def test_every_built_in_template_teaches_responses_and_their_ends(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], name: str, special: tuple[str, ...]
) -> None:
    tokenizer = make_tokenizer()
    if missing := [token for token in special if token not in tokenizer.get_vocab()]:
        with pytest.raises(UserError, match=f"writes {re.escape(missing[0])}.*not have as one token"):
            encode_all([{"messages": [ASK, ANSWER]}], tokenizer, chat_template=name)
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
    turns = [ASK, ANSWER | {"content": "First."}, ASK, ANSWER | {"content": "Second."}]
    (document,) = encode_all([{"messages": turns}], tokenizer, chat_template=name)
    texts = [text.strip().removeprefix("<think>\n\n</think>\n\n") for text in learnt_runs(document, tokenizer)]
    assert [text[: len(reply)] for text, reply in zip(texts, ("First.", "Second."), strict=True)] == [
        "First.",
        "Second.",
    ]
    ends = {text.partition(".")[2] for text in texts}
    assert ends <= {*special, tokenizer.eos_token}
    assert len(ends) == 1
