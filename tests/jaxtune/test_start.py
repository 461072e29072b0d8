"""What an adapter brings beside its matrices is there wherever a run that starts from it is read, shown or written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import save_model

from convert.__main__ import main as convert
from jaxtune import FastLanguageModel
from jaxtune.base import BaseModel, find_base
from jaxtune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.config_io import dump_yaml
from jaxtune.errors import UserError
from jaxtune.export import save_peft_adapter
from jaxtune.export.run import ExportConfig, export_run
from jaxtune.loading import load_tokenizer, run_tokenizer
from jaxtune.lora import init_lora
from jaxtune.nonfinite import keep_batch
from jaxtune.replay import replay
from jaxtune.start import start_from
from jaxtune.step import TrainState
from jaxtune.structure import batch_structure
from pallas_kernels import nf4
from pallas_kernels.cross_entropy import quantize_head

ROWS = 332
TOKEN = "<|own|>"
LARGE = 1000
Made = tuple[RunConfig, BaseModel, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run that starts from an adapter with a longer vocabulary and a tokenizer of its own; its base and tensors."""
    directory = tmp_path_factory.mktemp("start")
    model = ModelConfig(str(save_model(directory / "base", num_hidden_layers=1)), dtype="fp32")
    lora = LoraConfig(r=2, lora_alpha=2)
    base, adapter = find_base(model), directory / "run" / "adapter"
    rng = np.random.default_rng(0)
    modules = {
        f"{name}.weight": rng.normal(size=(ROWS, base.decoder.hidden_size)).astype(np.float32)
        for name in ("model.embed_tokens", "lm_head")
    }
    modules["model.embed_tokens.weight"][0, 0] = LARGE
    tokenizer = load_tokenizer(base.source)
    tokenizer.add_tokens([TOKEN])
    tree = jax.device_get(init_lora(lora, base.decoder))
    of_base: Any = {"decoder": base.decoder, "modules": modules, "tokenizer": tokenizer}
    save_peft_adapter(adapter, tree, lora, base.source, **of_base)
    lora = dataclasses.replace(lora, start_from=str(adapter))
    output, train = OutputConfig(str(directory / "on")), TrainConfig(max_steps=1)
    return RunConfig(model, DataConfig("none.jsonl", max_length=16), output, lora, train), base, modules


def test_base_and_tokenizer_are_the_adapters(made: Made) -> None:
    config, before, modules = made
    base, lora = start_from(config.lora, before)
    assert base.decoder.vocab_size == ROWS
    assert base.own_tokenizer is base.tokenizer
    assert TOKEN in base.tokenizer.get_vocab()
    assert TOKEN in run_tokenizer(config, base.source).get_vocab()
    assert jax.tree.leaves(lora)[0].dtype == jnp.float32
    head = modules["lm_head.weight"]
    for form, expected in (("dtype", head), ("int8", quantize_head(head)), ("nf4", nf4.quantize(head))):
        settings: Any = {"head": form}
        small, _ = start_from(config.lora, find_base(dataclasses.replace(config.model, **settings)))
        found = small.load()["lm_head"]["kernel"]
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_run_is_not_its_adapter(made: Made, tmp_path: Path) -> None:
    config, base, _ = made
    assert config.lora.start_from is not None
    adapter = Path(config.lora.start_from)
    with pytest.raises(UserError, match=rf"missing in this directory; name the run's adapter, {adapter}"):
        start_from(dataclasses.replace(config.lora, start_from=str(adapter.parent)), base)
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing in this directory; name one"):
        start_from(dataclasses.replace(config.lora, start_from=str(tmp_path)), base)


def test_an_adapter_that_is_not_finite_is_refused(made: Made, tmp_path: Path) -> None:
    config, base, _ = made
    tree = jax.device_get(init_lora(config.lora, base.decoder))
    leaf = np.array(tree["layers"]["mlp"]["up_proj"]["lora_B"])
    tree["layers"]["mlp"]["up_proj"]["lora_B"] = leaf
    leaf[-1, 0, 0] = np.nan
    save_peft_adapter(tmp_path / "adapter", tree, config.lora, base.source)
    with pytest.raises(UserError, match=r"adapter: the adapter holds NaN or infinities; name another one"):
        start_from(dataclasses.replace(config.lora, start_from=str(tmp_path / "adapter")), base)


def test_a_batch_is_run_again_with_the_same_model(made: Made, tmp_path: Path) -> None:
    config, before, _ = made
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    base, lora = start_from(config.lora, before)
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in batch_structure(config).items()}
    batch["tokens"][..., 3] = 0
    rng = jax.random.key_data(jax.random.key(0))
    state = TrainState(step=jnp.int32(1), lora=lora, opt_state=None, rng=rng, loss_scale=None)  # type: ignore[arg-type]
    keep_batch(tmp_path, 1, batch, state, {"values": {"loss": "nan"}, "where": "somewhere"})
    _, traced, rows = replay(tmp_path)
    assert traced.sizes[0][0] == LARGE
    assert rows == [base.tokenizer.decode(batch["tokens"][0, 0])]


def test_what_is_written_has_the_adapters_tokenizer(made: Made, tmp_path: Path) -> None:
    config, before, _ = made
    assert config.lora.start_from is not None
    shutil.copytree(config.lora.start_from, tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    for target in ("peft", "merged"):
        written = export_run(tmp_path, ExportConfig(target, tmp_path / target, verify=False))
        assert TOKEN in load_tokenizer(dataclasses.replace(before.source, path=written)).get_vocab()
    written = export_run(tmp_path, ExportConfig("gguf", tmp_path / "out", file_types=("F16",), verify=False))
    model, _ = FastLanguageModel.from_pretrained(config.lora.start_from, dtype="float32")
    model.save_pretrained_gguf(tmp_path / "live", quantization_method="f16")
    arguments = [str(before.source.path), "--adapter", config.lora.start_from, "--out"]
    assert convert(["to-gguf", *arguments, str(tmp_path / "f.gguf"), "--type", "F16"]) == 0
    assert convert(["to-4bit", *arguments, str(tmp_path / "4bit")]) == 0
    ggufs = written / "out-F16.gguf", tmp_path / "live" / "live-F16.gguf", tmp_path / "f.gguf"
    for path in (*ggufs, tmp_path / "4bit"):
        assert TOKEN in load_tokenizer(dataclasses.replace(before.source, path=path)).get_vocab()
