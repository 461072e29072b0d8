"""Exported runs in the programs that they are for, and what the export refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import peers
import peft
import pytest
import runs
import torch
import transformers

from convert import flax_tree
from jaxtune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, RunConfig
from jaxtune.config_io import dump_yaml
from jaxtune.errors import UserError
from jaxtune.export import save_peft_adapter
from jaxtune.export.__main__ import main
from jaxtune.export.run import ExportConfig, export_run
from jaxtune.linen import Decoder
from jaxtune.loading import load_model
from jaxtune.lora import adaptation, init_lora
from jaxtune.structure import frozen_structure

LORA = LoraConfig(r=4, lora_alpha=8)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's directory, its base model and adapter here, and what they compute together of some tokens."""

    path: Path
    ours: peers.Ours
    lora: dict[str, Any]
    tokens: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        return peers.our_logits(self.ours, self.tokens, self.lora, adaptation(LORA))


def make_run(directory: Path, name: str, **changes: Any) -> Run:
    """What training leaves, with a random adapter over an NF4 model of the family."""
    base, path = directory / "base", directory / "run"
    family_cases.save(base, family_cases.PLAIN[name], vocab_size=330, **(family_cases.BLOCK_SIZES | changes))
    runs.save_tokenizer(base)
    records = runs.save_records(directory / "records.jsonl", [runs.question(thing) for thing in runs.COLOURS])
    config = RunConfig(
        model=ModelConfig(str(base), dtype="fp32"),
        lora=LORA,
        data=DataConfig(train=str(records), max_length=64),
        output=OutputConfig(dir=str(path)),
    )
    path.mkdir()
    (path / "config.yaml").write_text(dump_yaml(config))
    ours = peers.load_ours(base, load_in_4bit=True)
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(lambda: init_lora(LORA, ours.decoder))
    lora = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes)
    save_peft_adapter(path / "adapter", lora, LORA, ours.source, decoder=ours.decoder)
    return Run(path, ours, lora, peers.random_tokens(330, 2, 30))


def their_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    model = peers.load_theirs(directory, attn_implementation="eager")
    return peers.their_logits(model, tokens)


@pytest.mark.parametrize("name", ["Gemma 2", "Phi-3"])
def test_merged_in_transformers(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, name)
    out = export_run(run.path, ExportConfig("merged", tmp_path / "out", dtype="fp32"))
    assert peers.relative_error(their_logits(out, run.tokens), run.logits) < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == runs.CHATML


def test_peft_over_the_unquantised_base(tmp_path: Path) -> None:
    """peft's merge of the exported adapter into the stored weights is what --base original writes."""
    run = make_run(tmp_path, "Phi-3")
    adapter = export_run(run.path, ExportConfig("peft", tmp_path / "adapter"))
    adapted = peft.PeftModel.from_pretrained(peers.load_theirs(tmp_path / "base"), adapter)
    expected = peers.their_logits(adapted, run.tokens)
    settings = ExportConfig("merged", tmp_path / "out", base="original", dtype="fp32", max_difference=2.0)
    out = export_run(run.path, settings)
    assert peers.relative_error(their_logits(out, run.tokens), expected) < 1e-4


def test_merged_4bit_in_bitsandbytes(tmp_path: Path) -> None:
    run = make_run(tmp_path, "Phi-3")
    settings = ExportConfig("merged-4bit", tmp_path / "out", dtype="fp32", max_difference=2.0)
    out = export_run(run.path, settings)
    model = peers.load_theirs(out)
    assert model.config.quantization_config.load_in_4bit
    linear = model.model.layers[0].self_attn.o_proj
    assert linear.weight.dtype == torch.uint8
    again = peers.load_ours(out, load_in_4bit=True)
    computed = peers.our_logits(again, run.tokens)
    assert peers.relative_error(computed, peers.their_logits(model, run.tokens)) < 1e-4
    # Quantised once more, and still the model that was trained rather than its base.
    base = peers.our_logits(run.ours, run.tokens)
    assert np.linalg.norm(computed - run.logits) < np.linalg.norm(base - run.logits)


def test_a_4bit_tree_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    """In another dtype than the files', too: a run's step is compiled from it."""
    run = make_run(tmp_path, "Llama")
    settings = ExportConfig("merged-4bit", tmp_path / "out", dtype="fp32", max_difference=2.0)
    config = ModelConfig(str(export_run(run.path, settings)), load_in_4bit=True)
    loaded = load_model(config, jnp.dtype(jnp.bfloat16))
    planned = frozen_structure(loaded.hf_config, config, jnp.bfloat16)
    assert jax.tree.structure(planned) == jax.tree.structure(loaded.frozen)


def test_gguf_and_flax(tmp_path: Path) -> None:
    run = make_run(tmp_path, "Gemma 3", query_pre_attn_scalar=16, num_hidden_layers=3)
    out = export_run(run.path, ExportConfig("gguf", tmp_path / "mine", file_types=("F32", "F16")))
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "mine-F16.gguf", "mine-F32.gguf"]
    assert "FROM ./mine-F32.gguf" in (out / "Modelfile").read_text()
    again = peers.load_ours(out / "mine-F32.gguf")
    assert peers.relative_error(peers.our_logits(again, run.tokens), run.logits) < 1e-4
    tree = export_run(run.path, ExportConfig("flax", tmp_path / "flax"))
    module = Decoder(run.ours.decoder, adaptation=adaptation(LORA))
    logits = module.apply(jax.tree.map(jnp.asarray, flax_tree.load_tree(tree)), jnp.asarray(run.tokens))
    assert peers.relative_error(logits, run.logits) < 1e-6


def test_too_far_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "Llama")
    arguments = ["--run", str(run.path), "--to", "merged", "--max-difference", "1e-9"]
    assert main(arguments) == 2
    assert "export refused" in capsys.readouterr().err
    assert not (run.path / "merged").exists()
    assert main(arguments[:4]) == 0
    config = json.loads((run.path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert main(arguments[:4]) == 2
    assert "exists" in capsys.readouterr().err
    config_file = run.path / "config.yaml"
    config_file.write_text(config_file.read_text().replace(str(tmp_path / "records.jsonl"), "(in memory)"))
    assert main([*arguments[:4], "--overwrite"]) == 2
    assert "records were in memory" in capsys.readouterr().err
    with pytest.raises(UserError, match="no finished run"):
        export_run(tmp_path, ExportConfig("merged", tmp_path / "x"))
