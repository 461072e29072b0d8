"""The two tokenization algorithms of GGUF's Llama models, as `tokenizers` pipelines.

The rules that cut text into words before byte-level merging are not in a GGUF file, which only names them
(`tokenizer.ggml.pre`): they are tabled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from convert.gguf.config import Metadata

_SPACE = "\u2581"  # SentencePiece's visible space.
_REMEDY = "use the tokenizer of the model's Hugging Face directory"


@dataclass(frozen=True)
class Backend:
    """A pipeline, and what the format takes for granted where the metadata are silent."""

    tokenizer: Tokenizer
    add_bos: bool
    special_ids: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _PreTokenizer:
    """How one `tokenizer.ggml.pre` cuts words: each pattern in turn isolates its matches in what is left."""

    patterns: tuple[str, ...]
    # Whether words that are tokens themselves are taken whole, whatever the merges say.
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: normalizers.Normalizer | None = None


def _gpt4(digits: str) -> str:
    """GPT-4's pattern; `digits` says how many digits stay together."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITWISE = _PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = _PreTokenizer((_gpt4(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    # What llama.cpp does with vocabularies whose rules it does not know.
    "default": _PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PreTokenizer((_GPT2,)),
    "smollm": _DIGITWISE,
    "starcoder": _DIGITWISE,
    "refact": _DIGITWISE,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    # llama.cpp leaves out Qwen's NFC; the model was trained with it.
    "qwen2": _PreTokenizer((_gpt4(r"\p{N}"),), normalizer=normalizers.NFC()),
}


def byte_level_bpe(metadata: Metadata, vocab: dict[str, int]) -> Backend:
    """Byte-level BPE over GPT-2's alphabet of printable bytes (`tokenizer.ggml.model` "gpt2").

    Raises:
        ValueError: `tokenizer.ggml.pre` is missing or unknown, or a merge is not made of tokens.
    """
    name = metadata["tokenizer.ggml.pre"]
    if name not in _PRE_TOKENIZERS:
        supported = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"{metadata.path}: tokenizer.ggml.pre is {name!r}; supported: {supported}. Else {_REMEDY}")
    pre = _PRE_TOKENIZERS[name]
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(f"{metadata.path}: merge {merge!r} is not made of tokens; convert the model again")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return Backend(tokenizer, pre.add_bos)


def sentencepiece_bpe(metadata: Metadata, vocab: dict[str, int], kinds: Sequence[int]) -> Backend:
    """SentencePiece's BPE (`tokenizer.ggml.model` "llama"): the neighbours whose union scores highest merge first.

    Characters without a piece become bytes. Every stretch of text between special tokens gets the leading space, not
    the first alone.

    Args:
        metadata: Of a GGUF file.
        vocab: Ids by token, in the order of the ids.
        kinds: GGUF's type of each token.

    Raises:
        ValueError: The scores are missing.
        NotImplementedError: Byte tokens are missing, or tokens of equal score make the order of merges depend on where
            in the text they stand.
    """
    if any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        raise NotImplementedError(f"{metadata.path}: SentencePiece vocabulary without all 256 byte tokens; {_REMEDY}")
    merges = []
    scores_seen = set()
    for token, kind, score in zip(vocab, kinds, metadata["tokenizer.ggml.scores"].tolist()):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += [(-score, -len(left), left, right) for left, right in splits]
        # Of equal scores the leftmost pair merges first, which ranks of pairs cannot say. The runs of spaces that tie
        # in Llama's own vocabulary do not need it: there the leftmost pair is the one with the longest left part.
        if splits and kind == TokenType.NORMAL and set(token) != {_SPACE}:
            if score in scores_seen:
                raise NotImplementedError(f"{metadata.path}: token {token!r} shares its score {score}; {_REMEDY}")
            scores_seen.add(score)
    merges.sort(key=lambda merge: merge[:2])

    model = models.BPE(vocab=vocab, merges=[(left, right) for *_, left, right in merges], byte_fallback=True)
    tokenizer = Tokenizer(model)
    to_spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        tokenizer.decoder = decoders.Sequence([*to_spaces, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = decoders.Sequence(to_spaces)
    return Backend(tokenizer, add_bos=True, special_ids={"bos": 1, "eos": 2, "unk": 0})


def pre_tokenizer_names() -> tuple[str, ...]:
    """The values of `tokenizer.ggml.pre` whose rules are known; of several with the same rules the usual one first."""
    return tuple(_PRE_TOKENIZERS)
