"""Files of every family through our tables and back: not a bit may change on the way."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import peers
import pytest
import torch
import transformers

from convert import families
from convert.__main__ import main
from convert.checkpoint import open_checkpoint
from convert.families.table import Slot
from convert.gguf.writer import write_gguf
from convert.merge import merged
from convert.safetensors_io import open_model, write_model
from jaxtune.models.config import DecoderConfig


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    model = open_model(directory)
    return {name: model.read(name) for name in model.infos}


def assert_same_files(one: Path, other: Path) -> None:
    expected, found = tensors_of(one), tensors_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", family_cases.PLAIN)
def test_dense_weights(tmp_path: Path, name: str) -> None:
    """Through the parameter tree on the device, and through `python -m convert`, which transformers then loads."""
    family_cases.save(tmp_path / "hf", family_cases.PLAIN[name])
    ours = peers.load_ours(tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf").to_dict()

    def leaf(slot: Slot) -> np.ndarray:
        stack = functools.reduce(lambda node, key: node[key], slot.path, ours.frozen)
        return np.asarray(stack if slot.layer is None else stack[slot.layer])

    infos, read = merged(families.get(config["model_type"]).slots(config), leaf, {}, 1.0, np.dtype(np.float32))
    write_model(tmp_path / "tree", infos, read, max_shard_bytes=50_000)
    assert_same_files(tmp_path / "hf", tmp_path / "tree")
    assert main(["to-safetensors", str(tmp_path / "hf"), "--out", str(tmp_path / "copy")]) == 0
    assert_same_files(tmp_path / "hf", tmp_path / "copy")
    again, information = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert again.dtype == torch.float32
    assert not any(information.values())


@pytest.mark.parametrize("name", family_cases.PLAIN)
def test_packed_weights(tmp_path: Path, name: str) -> None:
    """A checkpoint that bitsandbytes packed keeps its bytes, and its config says the same to our decoder."""
    family_cases.save(tmp_path / "dense", family_cases.PLAIN[name], **family_cases.BLOCK_SIZES)
    theirs: Any = peers.load_theirs(tmp_path / "dense", quantization_config=peers.nf4_settings())
    theirs.save_pretrained(tmp_path / "hf")
    assert main(["to-4bit", str(tmp_path / "hf"), "--out", str(tmp_path / "copy")]) == 0
    assert_same_files(tmp_path / "hf", tmp_path / "copy")
    one, other = (peers.load_ours(tmp_path / where, load_in_4bit=True) for where in ("hf", "copy"))
    assert isinstance(one.decoder, DecoderConfig)
    assert one.decoder == other.decoder


@pytest.mark.parametrize("name", family_cases.GGUF_CASES)
def test_gguf(tmp_path: Path, name: str) -> None:
    """Written and read back: the same logits, with norms that went through w + 1 in float32."""
    case = family_cases.CASES[name]
    # llama.cpp has no Qwen2 whose heads together are not as wide as the model.
    family_cases.save(tmp_path / "hf", case, **({"hidden_size": 56} if name == "Qwen2" else {}))
    path = tmp_path / "model.gguf"
    checkpoint = open_checkpoint(tmp_path / "hf")
    write_gguf(path, checkpoint.hf_config, checkpoint.infos, checkpoint.read, None, file_type="F32")
    one, other = (peers.load_ours(where) for where in (tmp_path / "hf", path))
    tokens = peers.random_tokens(one.decoder.vocab_size, 1, case.tokens)
    assert peers.relative_error(peers.our_logits(other, tokens), peers.our_logits(one, tokens)) < 1e-5


def test_readme_says_what_is_tested() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"<!-- families: family_cases.support_table() -->\n{family_cases.support_table()}" in readme
