"""GGUF files written here: llama.cpp's block types and bytes, and what our own reader finds in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import block_cases
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize
from runs import CHATML, save_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from convert.gguf import open_gguf
from convert.gguf.describe import Description
from convert.gguf.encode import encode
from convert.gguf.mixture import tensor_types
from convert.gguf.vocabulary import vocabulary
from convert.gguf.writer import write_gguf
from convert.safetensors_io import TensorInfo

VECTORS = json.loads((Path(__file__).parent / "vectors" / "block_types.json").read_text())
# Largest error over the largest value of a block, half a step of the coarser of scales.
PRECISION = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-9, "Q8_0": 1 / 200, "Q4_0": 1 / 7, "Q5_0": 1 / 15, "Q5_1": 1 / 15}


@pytest.mark.parametrize("kind", VECTORS["encodings"])
@pytest.mark.parametrize("compiled", [False, True])
def test_bytes_are_llama_cpps(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy alone, and through the library that may be there."""
    if compiled:
        pytest.importorskip("libgguf", reason="the extra `kquants` is not installed")
    else:
        monkeypatch.setattr("convert.gguf.encode.libgguf", None)
    encoded = encode(block_cases.weights(), GGMLQuantizationType[kind])
    assert hashlib.sha256(encoded).hexdigest() == VECTORS["encodings"][kind]


@pytest.mark.parametrize("case", block_cases.MODELS)
def test_types_are_llama_cpps(case: str) -> None:
    config, tensors = block_cases.model(**block_cases.MODELS[case])
    description = Description(config)
    shapes = {description.name(name): tensor.shape for name, tensor in tensors.items()}
    for file_type, expected in VECTORS["mixtures"][case].items():
        types = tensor_types(shapes, file_type, architecture="llama", layers=description.layers, grouped=True)
        assert block_cases.by_kind({name: kind.name for name, kind in types.items()}) == expected, file_type


@pytest.mark.parametrize("kind", PRECISION)
def test_encoding_decodes_to_about_the_same(kind: str) -> None:
    x = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    decoded = dequantize(encode(x, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]).reshape(x.shape)
    assert np.abs(decoded - x).max() <= PRECISION[kind] * np.abs(x).max()


@pytest.mark.parametrize(("kind", "bound"), [("Q4_K", 0.11), ("Q5_K", 0.055), ("Q6_K", 0.03)])
def test_k_quants_decode_to_about_the_same(kind: str, bound: float) -> None:
    """Root mean square error over that of the values: about step / sqrt(12), steps being 2 * 2.1 / (2**bits - 1)."""
    x = np.random.default_rng(1).standard_normal((5, 768)).astype(np.float32)
    decoded = dequantize(encode(x, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]).reshape(x.shape)
    assert np.sqrt(np.mean((decoded - x) ** 2)) < bound


def test_encoding_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="rows of 48 are no whole blocks of 32"):
        encode(np.zeros((2, 48), np.float32), GGMLQuantizationType.Q8_0)
    with pytest.raises(ValueError, match="IQ4_NL cannot be written; choose one of F32"):
        encode(np.zeros((2, 32), np.float32), GGMLQuantizationType.IQ4_NL)
    for kind, width in (("Q4_0", 32), ("Q6_K", 256), ("F32", 3)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            encode(np.full((1, width), np.nan, np.float32), GGMLQuantizationType[kind])
    for kind in ("F16", "Q8_0", "Q5_0", "Q4_K", "Q6_K"):
        with pytest.raises(ValueError, match=f"too large for the float16 of {kind}"):
            encode(np.full((1, 256), 1e10, np.float32), GGMLQuantizationType[kind])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_reads_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config, tensors = block_cases.model(
        num_hidden_layers=11, intermediate_size=80, rope_theta=500000.0, rms_norm_eps=1e-5, **changes
    )
    rng = np.random.default_rng(3)
    tensors = {name: rng.standard_normal(tensor.shape).astype(np.float32) for name, tensor in tensors.items()}
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    block_cases.write(tmp_path / "model.gguf", config, tensors, file_type="F32")
    again = open_gguf(tmp_path / "model.gguf")
    assert {key: again.hf_config[key] for key in config} == config
    assert again.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again.read(name), tensor)
    with pytest.raises(ValueError, match="exists"):
        write_gguf(tmp_path / "model.gguf", config, {}, tensors.__getitem__, None, file_type="F32")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    config, tensors = block_cases.model()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.inf
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight: NaN or infinity"):
        block_cases.write(tmp_path / "model.gguf", config, tensors, file_type="Q4_K_M")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'Q3_K_S' cannot be written; choose one of F32"):
        block_cases.write(tmp_path / "model.gguf", config, tensors, file_type="Q3_K_S")
    with pytest.raises(ValueError, match="has no place for this tensor"):
        block_cases.write(
            tmp_path / "model.gguf", config, tensors | {"model.surprise.weight": np.zeros((2, 2))}, file_type="F32"
        )
    with pytest.raises(ValueError, match="model_type 'mamba' cannot be written as GGUF"):
        block_cases.write(tmp_path / "model.gguf", config | {"model_type": "mamba"}, tensors, file_type="F32")
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(NotImplementedError, match="rope type 'dynamic'"):
        block_cases.write(tmp_path / "model.gguf", config | dynamic, tensors, file_type="F32")
    whole = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}
    with pytest.raises(NotImplementedError, match="truncate is false"):
        block_cases.write(tmp_path / "model.gguf", config | whole, tensors, file_type="F32")


TEXTS = ("Hello wor1d, it's 12345  spaces\n\n\ttabs <|im_start|>user\n", "na\u00efve \u4f60\u597d \U0001f999 C++", "")


def byte_level(pattern: str | None, normalizer: Any = None, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**settings))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["some words and numbers 123 for a tokenizer", "it's what we'll train on"] * 4, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")


def sentencepiece(prepend: bool) -> PreTrainedTokenizerFast:
    space = "\u2581"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["he", "ll", "hell", "hello", f"{space}w", "or", "wor", f"{space}wor", "ld", f"{space}world"]
    pieces += [*words, *(space + "abcdefghijklmnopqrstuvwxyz0123456789.")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", space)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prepend else replace
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "gpt-2": lambda: byte_level(None),
    "qwen2": lambda: byte_level(QWEN, normalizers.NFC()),
    "llama-bpe": lambda: byte_level(QWEN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"), ignore_merges=True),
    "default": lambda: sentencepiece(True),
    "no prefix": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_come_back(tmp_path: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = CHATML
    rows = len(tokenizer) + 5
    config, tensors = block_cases.model(vocab_size=rows)
    infos = {key: TensorInfo(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    write_gguf(tmp_path / "m.gguf", config, infos, tensors.__getitem__, tokenizer, file_type="F16")
    again = open_gguf(tmp_path / "m.gguf")
    if name != "no prefix":
        assert again.metadata["tokenizer.ggml.pre"] == name
    assert len(again.metadata["tokenizer.ggml.tokens"]) == rows
    built = again.build_tokenizer()
    assert built.chat_template == CHATML
    assert (built.eos_token_id, built.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    for text in TEXTS:
        assert built(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizers_that_gguf_cannot_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuts words by rules that GGUF has no name for"):
        vocabulary(byte_level(r"[a-z]+|\d+"), 500)
    lowercase = byte_level(None)
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="cuts words by rules"):
        vocabulary(lowercase, 500)
    with pytest.raises(ValueError, match=r"token \d+, the embedding 300 rows"):
        vocabulary(byte_level(None), 300)
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(NotImplementedError, match="type WordLevel cannot be written"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), 5)
    save_tokenizer(tmp_path)
    metadata = vocabulary(PreTrainedTokenizerFast.from_pretrained(tmp_path), 330)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert not metadata["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_heads_that_llama_cpp_has_no_place_for(model_type: str) -> None:
    config, _ = block_cases.model(**next(iter(block_cases.MODELS.values())))
    with pytest.raises(NotImplementedError, match=rf"heads of 48 are .* wide, .*llama.cpp has {model_type} only"):
        Description(config | {"model_type": model_type, "head_dim": 48})
