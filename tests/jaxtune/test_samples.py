"""Text of tokens as they come, stop strings, stop tokens, and prompts that cannot be encoded."""

from __future__ import annotations

from typing import Any

import pytest
from runs import save_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxtune.errors import UserError
from jaxtune.samples import TextStream, encode_chat, encode_prompt, encode_text, stop_ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def pieces(tokenizer: Any, text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    """The text of a stream that is fed with one token at a time."""
    stream = TextStream(tokenizer, stop)
    found = [stream.push([token]) for token in tokenizer(text)["input_ids"]]
    return [*found, stream.push([], last=True)], stream


def test_characters_of_several_tokens_come_whole(tokenizer: Any) -> None:
    text = "größe 🦊 日本"
    found, stream = pieces(tokenizer, text, [])
    assert "".join(found) == stream.text == text
    assert not any("\ufffd" in piece for piece in found)
    assert len(stream.ids) > len(text)


def test_half_a_character_at_the_end_is_shown(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer("🦊")["input_ids"][:2]) == ""
    assert stream.push([], last=True) == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["</end>"], "one <two"),
        (["absent"], "one <two</end> three"),
        (["three", "<two"], "one "),
        (["</end> threefold"], "one <two</end> three"),  # held back to the end, then let go
        (["", "o"], ""),
    ],
)
def test_stop_strings(tokenizer: Any, stop: list[str], expected: str) -> None:
    """Nothing of a stop string is shown, however many tokens it takes."""
    found, stream = pieces(tokenizer, "one <two</end> three", stop)
    assert "".join(found) == stream.text == expected
    assert stream.stopped == (expected != "one <two</end> three")


def test_stop_strings_overlap_themselves(tokenizer: Any) -> None:
    found, _ = pieces(tokenizer, "a##a###b", ["###b"])
    assert "".join(found) == "a##a"


def test_stop_tokens(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    assert stop_ids(tokenizer) == (end,)
    assert stop_ids(tokenizer, {"eos_token_id": 7}, {"eos_token_id": [9, 7]}, {"eos_token_id": None}, {}) == (end, 7, 9)
    tokenizer_without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert stop_ids(tokenizer_without) == ()


def test_prompts(tokenizer: Any) -> None:
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    turns = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}, *USER]
    ids = encode_chat(tokenizer, turns, "here")
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert (ids.count(start), ids.count(end)) == (4, 3)
    assert encode_prompt(tokenizer, "grass") == encode_chat(tokenizer, USER, "here")
    assert encode_text(tokenizer, "grass", "here") == tokenizer("grass")["input_ids"]


USER = [{"role": "user", "content": "grass"}]


def test_what_cannot_be_encoded(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"--prompt: the tokenizer gives no token for ''"):
        encode_text(tokenizer, "", "--prompt")
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        encode_chat(plain, USER, "here")
    plain.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(UserError, match=r"here: the chat template refuses the turns \(user\) with 'grass': only tools"):
        encode_chat(plain, USER, "here")
