"""Build the tokenizer that a GGUF file's metadata describe."""

from __future__ import annotations

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from convert.gguf.bpe import Backend, byte_level_bpe, sentencepiece_bpe
from convert.gguf.config import Metadata

# The types of token that are found in text before anything is merged, and whether they are special.
_ADDED = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """Build the tokenizer, with its chat template, special ids and `add_bos_token` as the file has them.

    Ids equal llama.cpp's (but for "qwen2", which normalises to NFC as Qwen does). Control tokens and the unknown token
    are special: `split_special_tokens=True` reads them as text. User-defined tokens are always recognised. A padding
    token that the file does not name stays None.

    Args:
        metadata: Of a GGUF file.

    Raises:
        ValueError: A key is missing, the pre-tokenizer is unknown, or the vocabulary contradicts itself.
        NotImplementedError: An algorithm other than byte-level BPE ("gpt2") and SentencePiece BPE ("llama"), or a
            SentencePiece vocabulary without byte tokens or with tokens of equal score.
    """
    # An unnamed token is unreachable; llama.cpp gives it the same name.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(metadata["tokenizer.ggml.tokens"])]
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), TokenType.NORMAL))
    if not len(vocab) == len(tokens) == len(kinds):
        raise ValueError(
            f"{metadata.path}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(vocab)} of them different, and "
            f"tokenizer.ggml.token_type {len(kinds)}; the three must be equal: convert the model again"
        )

    algorithm = str(metadata["tokenizer.ggml.model"])
    if algorithm == "gpt2":
        backend = byte_level_bpe(metadata, vocab)
    elif algorithm == "llama":
        backend = sentencepiece_bpe(metadata, vocab, kinds)
    else:
        raise NotImplementedError(
            f"{metadata.path}: tokenizer.ggml.model {algorithm!r} is not supported (gpt2 and llama are); use the "
            "tokenizer of the model's Hugging Face directory"
        )
    backend.tokenizer.add_tokens(
        [
            AddedToken(token, special=_ADDED[kind], normalized=False)
            for token, kind in zip(tokens, kinds)
            if kind in _ADDED
        ]
    )
    special_ids = _special_ids(metadata, backend, kinds)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend.tokenizer,
        add_bos_token=_adds(metadata, "bos", special_ids, backend.add_bos),
        add_eos_token=_adds(metadata, "eos", special_ids, False),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[token_id] for role, token_id in special_ids.items()},
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _special_ids(metadata: Metadata, backend: Backend, kinds: np.ndarray) -> dict[str, int]:
    ids = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        key = f"tokenizer.ggml.{key}_token_id"
        token_id = metadata.get(key, backend.special_ids.get(role))
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(kinds):
            raise ValueError(f"{metadata.path}: {key} is {token_id}, of {len(kinds)} tokens; convert the model again")
        # Naming an ordinary word as padding or unknown would cut it out of running text.
        if role in ("bos", "eos") or kinds[token_id] in _ADDED:
            ids[role] = token_id
    return ids


def _adds(metadata: Metadata, role: str, special_ids: dict[str, int], default: bool) -> bool:
    """Whether encoding adds the token of `role` (bos, eos) to every text."""
    adds = metadata.get(f"tokenizer.ggml.add_{role}_token", default)
    if adds and role not in special_ids:
        raise ValueError(
            f"{metadata.path}: {role} is to be added to every text, but tokenizer.ggml.{role}_token_id is missing; "
            "convert the model again"
        )
    return adds
