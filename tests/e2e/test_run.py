"""The command as its users run it: what a run prints and leaves, and that it needs neither network nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Command, Main, WriteRun, save_tokenizer

from jaxtune import memory
from jaxtune.config import RunConfig
from jaxtune.config_io import load_config
from jaxtune.export import load_peft_adapter
from jaxtune.metrics import Progress, read_metrics

PROMPT = "What colour is the sky?"
# Put before every other module by its name: Python imports a sitecustomize when it starts. torch is hidden where it is
# installed, as for a user who has none.
GUARD = """
import importlib.machinery, importlib.metadata, socket

def refuse(*arguments, **named):
    raise AssertionError(f"a local run reached for the network: {arguments}")

class NoNetwork(socket.socket):
    connect = connect_ex = sendto = bind = refuse

socket.socket = NoNetwork
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse

find, distribution = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name

def find_without_torch(name, path=None, target=None):
    return None if name.partition(".")[0] == "torch" else find(name, path, target)

def distribution_without_torch(name):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)

importlib.machinery.PathFinder.find_spec = staticmethod(find_without_torch)
importlib.metadata.Distribution.from_name = staticmethod(distribution_without_torch)
"""
CHECK_THEN_TRAIN = """
import importlib.util, socket, sys
try:
    socket.create_connection(("127.0.0.1", 9))
except AssertionError:
    pass
else:
    sys.exit("the guard does not hold")
assert importlib.util.find_spec("torch") is None
from jaxtune.train import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_run_in: WriteRun, command: Command) -> tuple[Path, str]:
    """One run to its end without network and torch: its output directory, and what it printed."""
    directory = tmp_path_factory.mktemp("finished")
    guard = directory / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    config = write_run_in(
        directory,
        train={"eval_steps": 2},
        output={"save_steps": 2, "save_total_limit": 2, "sample_prompts": [PROMPT]},
    )
    done = command("--config", config, code=CHECK_THEN_TRAIN, PYTHONPATH=str(guard))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "out", done.stdout


def test_leaves_its_files(finished: tuple[Path, str]) -> None:
    output, _ = finished
    names = ["adapter", "checkpoints", "config.yaml", "metrics.jsonl", "report.html"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["4", "6"]
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (output / "adapter").iterdir()) == names
    assert load_config(output / "config.yaml") == load_config(output.parent / "run.yaml")


def test_held_out_loss_falls_and_is_recorded(finished: tuple[Path, str]) -> None:
    records = read_metrics(finished[0] / "metrics.jsonl")
    held_out = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert list(held_out) == [0, 2, 4, 6]
    assert held_out[6] < held_out[2] < 0.8 * held_out[0]
    updates = [record for record in records if "loss" in record]
    assert [record["step"] for record in updates] == [1, 2, 3, 4, 5, 6]
    assert updates[-1]["loss"] < 0.5 * updates[0]["loss"]
    rates = [0.01 * (6 - done) / 6 for done in range(6)]
    np.testing.assert_allclose([record["learning_rate"] for record in updates], rates, rtol=1e-6)
    assert all(record["grad_norm"] > 0 and record["tokens_per_second"] > 0 for record in updates)


def test_records_samples_before_and_after(finished: tuple[Path, str]) -> None:
    output, printed = finished
    samples = [record for record in read_metrics(output / "metrics.jsonl") if "sample" in record]
    assert [(record["sample"], record["step"], record["prompt"]) for record in samples] == [
        ("before", 0, PROMPT),
        ("after", 6, PROMPT),
    ]
    assert samples[0]["answer"] != samples[1]["answer"]
    assert f"[after] {PROMPT}\n    {samples[1]['answer']}" in printed


def test_shows_what_it_does(finished: tuple[Path, str]) -> None:
    output, printed = finished
    for part in (
        "train: 18 documents of 18 records",
        "eval: 3 documents of 3 records",
        "load the model: ",
        "llama: 2 layers, computed in float32",
        "compile the step: ",
        "one step with remat none holds ",
        "step 1/6  loss ",
        "step 6/6  loss ",
        "  held-out loss: ",
        f"  adapter: {output / 'adapter'}",
    ):
        assert part in printed


def test_adapter_is_what_was_trained(finished: tuple[Path, str], base_model: Path) -> None:
    adapter = finished[0] / "adapter"
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (48, 48, 0.1)
    assert fields["base_model_name_or_path"] == str(base_model)
    lora, config = load_peft_adapter(adapter)
    assert config.r == 48
    matrices = [lora["layers"]["mlp"]["down_proj"][name] for name in ("lora_A", "lora_B")]
    assert [matrix.shape for matrix in matrices] == [(2, 48, 96), (2, 64, 48)]
    assert all(np.abs(matrix).max(axis=(1, 2)).min() > 0 for matrix in matrices), "a layer's B is still zero"


@pytest.mark.slow
def test_two_devices_compute_what_one_does(
    finished: tuple[Path, str], tmp_path: Path, write_run: WriteRun, command: Command
) -> None:
    """The sums over a batch, spread over the mesh, are the same up to their order; so is what they lead to."""
    done = command("--config", write_run(mesh={"fsdp": 2}), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr
    one, two = (
        [record for record in read_metrics(output / "metrics.jsonl") if "loss" in record]
        for output in (finished[0], tmp_path / "out")
    )
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[0][name], one[0][name], rtol=1e-5)
    # Later steps differ by more: a moment at the edge of two 8-bit codes may fall to either side.
    np.testing.assert_allclose(two[-1]["loss"], one[-1]["loss"], rtol=0.01)


# Two linears compile faster than seven, and one of them has 8-bit moments.
FEW = {"lora": {"target_modules": ["v_proj", "down_proj"]}, "train": {"max_steps": 2}}
SMOKE: dict[str, dict[str, dict[str, Any]]] = {
    "bf16": {"model": {"dtype": "bf16"}, "lora": {"dtype": "bf16"}},
    "16-bit weights, adamw": {"model": {"load_in_4bit": False, "dtype": "bf16"}, "train": {"optim": "adamw"}},
    # fp16's first updates are skipped, until the loss scale fits.
    "fp16, not packed": {
        "model": {"dtype": "fp16"},
        "data": {"packing": False, "train_on": "all"},
        "train": {"max_steps": 5, "lr_scheduler_type": "cosine"},
    },
    "text, remat full": {
        "data": {"form": "text", "text_field": "output"},
        "lora": {"use_rslora": True},
        "train": {"remat": "full", "loss_chunk": 32},
    },
    "one epoch, remat offload": {
        "model": {"double_quant": False},
        "train": {"max_steps": None, "batch_size": 3, "remat": "offload"},
    },
}


def test_auto_takes_the_first_policy_that_fits(
    tmp_path: Path, write_run: WriteRun, run_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fits(components: dict[str, int], config: RunConfig) -> bool:
        asked.append(components)
        return len(asked) > 1

    monkeypatch.setattr(memory, "fits", fits)
    few = FEW | {"train": {"max_steps": 2, "remat": "auto"}}
    status, err = run_main("--config", write_run(**few))
    assert status == 0, err
    assert len(asked) == 3  # of two policies, and of the one that is taken once more
    (chosen,) = [record["remat"] for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "remat" in record]
    assert chosen == "selective"


@pytest.mark.parametrize("sections", SMOKE.values(), ids=SMOKE.keys())
def test_settings_run(
    sections: dict[str, dict[str, Any]],
    tmp_path: Path,
    write_run: WriteRun,
    run_main: Main,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    config = write_run(**sections | {name: few | sections.get(name, {}) for name, few in FEW.items()})
    status, err = run_main("--config", config)
    assert status == 0, err
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert held_out[-1] < held_out[0]
    assert notes
    assert not [note for note in notes if "did not change" in note]
    _, lora = load_peft_adapter(tmp_path / "out" / "adapter")
    wanted = load_config(config).lora
    assert (lora.dtype, lora.use_rslora, lora.target_modules) == (
        wanted.dtype,
        wanted.use_rslora,
        wanted.target_modules,
    )


def test_an_adapter_is_trained_further(tmp_path: Path, write_run: WriteRun, run_main: Main) -> None:
    few = FEW | {"lora": FEW["lora"] | {"lora_dropout": 0.0}}
    status, err = run_main("--config", write_run(**few))
    assert status == 0, err
    first = tmp_path / "out"
    assert not (first / "adapter" / "tokenizer.json").exists()
    save_tokenizer(first / "adapter")
    config = write_run(
        **few | {"lora": few["lora"] | {"start_from": str(first / "adapter")}, "output": {"dir": str(tmp_path / "on")}}
    )
    for wrong, said in (("lora.r=8", "set lora.r to 48"), ("lora.target_modules=[q_proj]", "[v_proj, down_proj]")):
        status, err = run_main("--config", config, "--set", wrong)
        assert (status, said in err) == (2, True), err
    status, err = run_main("--config", config, "--set", f"lora.start_from={tmp_path / 'nowhere'}")
    assert status == 2
    assert "lora.start_from" in err
    status, err = run_main("--config", config)
    assert status == 0, err
    before, after = (
        [record["eval_loss"] for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record]
        for run in (first, tmp_path / "on")
    )
    assert after[0] == pytest.approx(before[-1], rel=1e-6)
    assert after[-1] < after[0]
    assert (tmp_path / "on" / "adapter" / "tokenizer.json").is_file()
