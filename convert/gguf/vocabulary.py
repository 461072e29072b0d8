"""A Hugging Face tokenizer as GGUF metadata, checked by building the tokenizer back from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from convert.gguf.bpe import byte_level_bpe, pre_tokenizer_names
from convert.gguf.config import Metadata
from convert.gguf.tokenizer import build_tokenizer

# Words, digits in runs, contractions, punctuation, white space, scripts and composed characters: what the rules of
# pre-tokenizers treat differently.
_PROBE = (
    "Hello, World! I'll don't WE'VE it's  two   spaces\n\nnew\r\n\tlines 3 33 333 3333 3.14 1,000 x_y a-b C++ #1 @me "
    "<a>+=$^~|`\"' ...!!!??? na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \u6211\u60f3 \u041d\u0435\u0449\u043e "
    "\u0639\u0631\u0628 \U0001f999\U0001f999 \u2581 end \n  \t "
)


def vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata that make llama.cpp encode as `tokenizer` does.

    Args:
        tokenizer: byte-level BPE, or SentencePiece's BPE with byte tokens.
        rows: rows of the embedding; those beyond the tokenizer's tokens get names that no text holds.

    Raises:
        ValueError: more tokens than rows, or rules that GGUF has no name for.
        NotImplementedError: another algorithm.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise NotImplementedError(f"a tokenizer of type {model['type']} cannot be written as GGUF; only BPE can")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = np.full(rows, TokenType.UNUSED, np.int32)
    ids = {**model["vocab"], **{added["content"]: added["id"] for added in state["added_tokens"]}}
    if max(ids.values()) >= rows:
        raise ValueError(
            f"the tokenizer has token {max(ids.values())}, the embedding {rows} rows; use the tokenizer of the model"
        )
    for token, at in ids.items():
        tokens[at], kinds[at] = token, TokenType.NORMAL
    for added in state["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if model.get("byte_fallback"):
        metadata |= _sentencepiece(tokenizer, tokens, kinds, merges)
    else:
        metadata["tokenizer.ggml.model"] = "gpt2"
        metadata["tokenizer.ggml.pre"] = _pre_tokenizer_name(tokenizer.backend_tokenizer, model)
        metadata["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    for key, at in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if at is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = at
    encoded: Any = tokenizer("a")["input_ids"]
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id in encoded[:1]
    metadata["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id in encoded[-1:]
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    _check(tokenizer, metadata)
    return metadata


def _sentencepiece(
    tokenizer: PreTrainedTokenizerFast, tokens: list[str], kinds: np.ndarray, merges: list[tuple[str, ...]]
) -> dict[str, Any]:
    # Only the order of scores matters: that in which merges are tried. What is never merged scores below all.
    scores = np.full(len(tokens), -1e6, np.float32)
    at = {token: i for i, token in enumerate(tokens)}
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[at[left + right]] = -float(rank)
    for byte in range(256):
        if (place := at.get(f"<0x{byte:02X}>")) is not None:
            kinds[place], scores[place] = TokenType.BYTE, 0.0
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": str(first).startswith("\u2581"),
    }


def _pre_tokenizer_name(original: Tokenizer, model: dict[str, Any]) -> str:
    """GGUF's name of the rules that cut text into words: those that cut the probe alike."""
    expected = _words(original)
    for name in pre_tokenizer_names():
        metadata = Metadata({"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": []}, Path("tokenizer.json"))
        candidate = byte_level_bpe(metadata, {}).tokenizer
        ignores = json.loads(candidate.to_str())["model"].get("ignore_merges", False)
        if _words(candidate) == expected and ignores == bool(model.get("ignore_merges")):
            return name
    raise ValueError(
        "the tokenizer cuts words by rules that GGUF has no name for here; known are those of "
        f"{', '.join(pre_tokenizer_names())}"
    )


def _words(tokenizer: Tokenizer) -> list[str]:
    text = _PROBE if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(_PROBE)
    return [text] if tokenizer.pre_tokenizer is None else [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _check(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Any]) -> None:
    again = build_tokenizer(Metadata(metadata, Path("tokenizer.json")))
    expected, got = (one(_PROBE, add_special_tokens=False)["input_ids"] for one in (tokenizer, again))
    if expected != got:
        first = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
        raise ValueError(
            f"the tokenizer does what GGUF's metadata cannot say: of a probe's tokens the {first + 1}th would differ; "
            "write the model as safetensors instead"
        )
