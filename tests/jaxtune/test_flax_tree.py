"""A model saved as a parameter tree: it loads as it was, bit for bit, and what is no such tree is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import save_model

from convert import flax_tree
from convert.inspect import inspect
from jaxtune.config import ModelConfig
from jaxtune.errors import UserError
from jaxtune.export.run import ExportConfig, export_model
from jaxtune.loading import fingerprint, load_model, load_tokenizer, resolve_source
from pallas_kernels import nf4
from pallas_kernels.cross_entropy import decoded_head
from pallas_kernels.nf4 import NF4Tensor

FP32 = jnp.dtype(jnp.float32)


def load(path: Path, **settings: Any) -> Any:
    return load_model(ModelConfig(str(path), dtype="fp32", **settings), FP32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's directory, and its tree's."""
    directory = tmp_path_factory.mktemp("saved")
    base = save_model(directory / "base")
    config = ExportConfig("flax", directory / "tree", verify=False)
    return base, export_model(ModelConfig(str(base), dtype="fp32"), config)


def test_loads_bit_for_bit(saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, tree = saved
    expected = load(base)
    monkeypatch.setattr(nf4, "quantize", None)
    found = load(tree)
    assert found.hf_config.items() >= {"model_type": "llama", "hidden_size": expected.hf_config["hidden_size"]}.items()
    assert isinstance(found.frozen["layers"]["mlp"]["up_proj"]["kernel"], NF4Tensor)
    assert jax.tree.structure(found.frozen) == jax.tree.structure(expected.frozen)
    for one, other in zip(jax.tree.leaves(found.frozen), jax.tree.leaves(expected.frozen), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert load_tokenizer(resolve_source(ModelConfig(str(tree)))).get_vocab()
    assert len(fingerprint(resolve_source(ModelConfig(str(tree))))) == 64
    assert "restore it bit for bit" in inspect(tree)


def test_decodes_where_4bit_is_not_asked_for(saved: tuple[Path, Path]) -> None:
    packed, dense = (
        load(saved[1], load_in_4bit=four).frozen["layers"]["mlp"]["up_proj"]["kernel"] for four in (True, False)
    )
    np.testing.assert_array_equal(dense, nf4.dequantize(packed))


def test_heads_in_fewer_bits(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """One in 8 bits is written as it acts, a packed one stays as it is."""
    for form in ("int8", "nf4"):
        settings: Any = {"head": form}
        config = ExportConfig("flax", tmp_path / form, verify=False)
        tree = export_model(ModelConfig(str(saved[0]), dtype="fp32", **settings), config)
        expected = load(saved[0], head=form).frozen["lm_head"]["kernel"]
        found = load(tree).frozen["lm_head"]["kernel"]
        if form == "int8":
            np.testing.assert_array_equal(found, decoded_head(expected, FP32))
            continue
        assert isinstance(found, NF4Tensor)
        for kept in (found, load(tree, head=form).frozen["lm_head"]["kernel"]):
            jax.tree.map(np.testing.assert_array_equal, kept, expected)


def _other_format(tree: Path) -> None:
    marker = json.loads((tree / flax_tree.MARKER).read_text())
    (tree / flax_tree.MARKER).write_text(json.dumps(marker | {"format": 2}))


def _other_shape(tree: Path) -> None:
    marker = json.loads((tree / flax_tree.MARKER).read_text())
    marker["leaves"]["params/norm/scale"][1] = [7]
    (tree / flax_tree.MARKER).write_text(json.dumps(marker))


def _no_arrays(tree: Path) -> None:
    shutil.rmtree(tree / "variables" / "d")


def _with_adapter(tree: Path) -> None:
    variables = flax_tree.load_tree(tree)
    shutil.rmtree(tree / "variables")
    (tree / flax_tree.MARKER).unlink()
    flax_tree.save_tree(tree, variables | {"lora": {"a": np.zeros(2, np.float32)}}, lora_scaling=1.0)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_other_format, "not of format 1; convert the model again"),
        (_other_shape, "its arrays are not those that tree.json lists; convert the model again"),
        (_no_arrays, "its arrays cannot be read"),
        (_with_adapter, "the adapter in it would be left out here"),
    ],
)
def test_what_is_refused(saved: tuple[Path, Path], tmp_path: Path, damage: Any, said: str) -> None:
    shutil.copytree(saved[1], tmp_path / "tree")
    damage(tmp_path / "tree")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "tree")
