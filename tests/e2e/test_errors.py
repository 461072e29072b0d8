"""What the user can fix is said in one message, with exit status 2, before weights are read or anything is compiled."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from mistakes import MISTAKES
from runs import Command, Main, WriteRun, save_model

from convert.safetensors_io import TensorInfo, write_file
from jaxtune import train
from jaxtune.metrics import read_metrics


def assert_one_message(err: str, named: tuple[str, ...]) -> None:
    (message,) = re.findall(r"(?:^|\n|\r)(error: .*)", err, re.DOTALL)
    assert not re.search(r"[\r\n]error: |Traceback", message)
    assert all(part in message for part in named), message


def test_mistakes(
    tmp_path: Path, write_run: WriteRun, run_main: Main, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is answered with its one sentence, value, rule and remedy, and leaves nothing behind; … is what others say,
    a parser or the system. All in one test, so that none can be missing."""
    assert len(MISTAKES) >= 40
    wrong = {}
    for number, (name, (prepare, expected)) in enumerate(MISTAKES.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        monkeypatch.chdir(directory)
        given = dict(prepare(directory))
        arguments = given.pop("arguments", {}).get("more", ())
        given["output"] = {"dir": str(directory / "out"), **given.get("output", {})}
        status, err = run_main("--config", write_run(**given), *arguments)
        (message,) = re.findall(r"(?:^|\n|\r)error: (.*)", err.rstrip(), re.DOTALL)
        for place, label in ((directory, "<dir>"), (tmp_path / "run.yaml", "<run>"), (tmp_path, "<run dir>")):
            message = message.replace(str(place), label)
        pattern = re.escape(expected).replace("…", ".*")
        if status != 2 or not re.fullmatch(pattern, message, re.DOTALL) or "Traceback" in err:
            wrong[name] = (status, message)
        elif (directory / "out").exists():
            wrong[name] = "it left files"
    assert not wrong


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


def test_out_of_memory_at_run(monkeypatch: pytest.MonkeyPatch, write_run: WriteRun, run_main: Main) -> None:
    """The step compiles, and its call is refused by the allocator."""

    class Exhausted:
        def lower(self, *arguments: Any) -> Exhausted:
            return self

        def compile(self) -> Exhausted:
            return self

        def memory_analysis(self) -> Any:
            sizes = dict.fromkeys(
                ("argument_size_in_bytes", "host_argument_size_in_bytes", "host_temp_size_in_bytes"), 0
            )
            return SimpleNamespace(temp_size_in_bytes=3 * 2**30, **sizes)

        def __call__(self, *arguments: Any) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(train, "jit_train_step", lambda *arguments: Exhausted())
    status, err = run_main("--config", write_run(data={"eval": None}))
    assert status == 2
    named = ("out of memory: training: RES", "  activations, gradients and logits: 3.00 GiB", "lower train.batch_size")
    assert_one_message(err, named)


def test_debug_shows_tracebacks_and_choices(write_run: WriteRun, run_main: Main) -> None:
    with pytest.raises(train.UserError, match=r"unknown key train\.batchsize"):
        run_main("--config", write_run(), "--debug", "--set", "train.batchsize=2")
    assert logging.getLogger("pallas_kernels").isEnabledFor(logging.INFO)
    assert not logging.getLogger("jax").isEnabledFor(logging.INFO)
    assert run_main("--config", "nowhere.yaml")[0] == 2
    assert not logging.getLogger("pallas_kernels").isEnabledFor(logging.INFO)


def test_a_limit_on_a_cpu_is_held_against_what_was_compiled(write_run: WriteRun, run_main: Main) -> None:
    status, err = run_main("--config", write_run(train={"memory_limit": "3MiB"}))
    assert status == 2
    assert_one_message(err, ("the run does not fit the device\nOf 3 MiB that the device gives:", "activations"))
    assert "nothing else is held to it" in err
