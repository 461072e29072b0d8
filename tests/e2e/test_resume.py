"""A run that was interrupted goes on bit for bit, and only as the run that it was; an output is never overwritten."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared import computed, saved_state
from runs import Command, Main, WriteRun, save_model

from jaxtune.config_io import dump_yaml, load_config
from jaxtune.metrics import MetricsWriter
from jaxtune.run_directory import RunDirectory

# The process dies when steps 4 and 5 are in the metrics and in no checkpoint.
DIE_AFTER_STEP_5 = """
import os, signal, sys
from jaxtune.metrics import MetricsWriter
from jaxtune.train import main

write = MetricsWriter.write

def write_then_die(self, step, **values):
    write(self, step, **values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

MetricsWriter.write = write_then_die
sys.exit(main(sys.argv[1:]))
"""
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"eval_steps": 2},
    "output": {"save_steps": 3, "sample_prompts": ["What colour is coal?"]},
}
CONSTANT: dict[str, dict[str, Any]] = {
    "train": {"lr_scheduler_type": "constant", "max_steps": 4},
    "output": {"sample_prompts": ["What colour is coal?"]},
}


def assert_same_end(output: Path, other: Path, step: int) -> None:
    """Both runs left the same adapter and the same optimizer state, to the bit."""
    adapters = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (output, other)]
    assert adapters[0] == adapters[1]
    states = [saved_state(path, step) for path in (output, other)]
    assert states[0].keys() == states[1].keys()
    assert any("opt_state" in name for name in states[0])
    assert any(array.dtype == np.uint8 for array in states[0].values()), "no 8-bit optimizer state in this test"
    for name, array in states[0].items():
        assert array.dtype == states[1][name].dtype
        assert array.tobytes() == states[1][name].tobytes(), name


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the lock that a killed run leaves and the next one takes away."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in files}


@contextlib.contextmanager
def asked_to_stop(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int, times: int = 1) -> Iterator[None]:
    """A run in this process gets a signal when this step's metrics are written."""
    write = MetricsWriter.write

    def write_then_signal(self: MetricsWriter, at: int, **values: Any) -> None:
        write(self, at, **values)
        for _ in range(times if at == step and "loss" in values else 0):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", write_then_signal)
        yield


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, write_run_in: WriteRun, command: Command) -> Path:
    """The directory of a run of 6 steps that was killed after step 5: configuration, data and output."""
    directory = tmp_path_factory.mktemp("interrupted")
    killed = command("--config", write_run_in(directory, **SECTIONS), code=DIE_AFTER_STEP_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    return directory


@pytest.fixture
def copy(interrupted: Path, tmp_path: Path) -> Path:
    """The interrupted run's output, for one test to go on from."""
    return shutil.copytree(interrupted / "out", tmp_path / "copy")


@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(
    interrupted: Path,
    copy: Path,
    write_run: WriteRun,
    tmp_path: Path,
    run_main: Main,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, and then stopped by each signal."""
    status, err = run_main("--config", write_run(**SECTIONS))
    assert status == 0, err
    assert [record["step"] for record in computed(copy) if "loss" in record] == [1, 2, 3, 4, 5]
    again = ("--config", interrupted / "run.yaml", "--set", f"output.dir={copy}", "--resume")
    for number, step in ((signal.SIGINT, 4), (signal.SIGTERM, 5)):
        with asked_to_stop(monkeypatch, number, step):
            status, err = run_main(*again)
        assert status == 128 + number
        assert err.endswith(
            f"stopped by {number.name} after step {step} of 6, which is saved; the same command with --resume auto "
            "continues\n"
        )
        assert max(map(int, os.listdir(copy / "checkpoints"))) == step
    status, err = run_main(*again)
    assert status == 0, err
    assert_same_end(tmp_path / "out", copy, step=6)
    assert computed(tmp_path / "out") == computed(copy)


def test_a_second_signal_stops_at_once(
    copy: Path, interrupted: Path, run_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked_to_stop(monkeypatch, signal.SIGTERM, 4, times=2):
        status, err = run_main("--config", interrupted / "run.yaml", "--set", f"output.dir={copy}", "--resume", "auto")
    assert status == 128 + signal.SIGTERM
    assert err.endswith(
        "stopped without saving, at the second signal; the same command with --resume auto goes on from the newest "
        "checkpoint\n"
    )
    assert os.listdir(copy / "checkpoints") == ["3"]


def test_run_at_a_constant_rate_is_prolonged_bit_for_bit(write_run: WriteRun, tmp_path: Path, run_main: Main) -> None:
    config = write_run(**CONSTANT)
    short = ("--config", config, "--set", f"output.dir={tmp_path / 'short'}")
    for arguments in (["--config", config], [*short, "--set", "train.max_steps=2"], [*short, "--resume"]):
        status, err = run_main(*arguments)
        assert status == 0, err
    assert_same_end(tmp_path / "out", tmp_path / "short", step=4)
    losses = [[record for record in computed(tmp_path / name) if "loss" in record] for name in ("out", "short")]
    assert losses[1][1].pop("eval_loss") > 0  # at the end of the short run
    assert losses[1][1].pop("eval_perplexity") > 1
    assert losses[0] == losses[1]

    # What is finished can be exported again, which records nothing, and cannot be cut.
    adapter, records = contents(tmp_path / "short" / "adapter"), computed(tmp_path / "short")
    shutil.rmtree(tmp_path / "short" / "adapter")
    status, err = run_main(*short, "--resume")
    assert status == 0, err
    assert contents(tmp_path / "short" / "adapter") == adapter
    assert computed(tmp_path / "short") == records
    status, err = run_main(*short, "--resume", "--set", "train.max_steps=3")
    assert (status, "step 4 is done" in err, "train.max_steps" in err) == (2, True, True)


def test_a_step_may_be_cut_otherwise(write_run: WriteRun, tmp_path: Path, run_main: Main) -> None:
    """The rows of a step stay the same ones, in smaller micro-batches and more of them; another number is refused."""
    config = write_run(train=CONSTANT["train"], lora={"lora_dropout": 0.0})
    cut = ("--config", config, "--set", f"output.dir={tmp_path / 'cut'}")
    smaller = ("--resume", "--set", "train.batch_size=1", "--set")
    for arguments in (["--config", config], [*cut, "--set", "train.max_steps=2"]):
        status, err = run_main(*arguments)
        assert status == 0, err
    status, err = run_main(*cut, *smaller, "train.gradient_accumulation_steps=3")
    assert (status, "train.gradient_accumulation_steps): 4 then, 3 now" in err) == (2, True)
    status, err = run_main(*cut, *smaller, "train.gradient_accumulation_steps=4")
    assert status == 0, err
    losses = [[r["loss"] for r in computed(tmp_path / name) if "loss" in r] for name in ("out", "cut")]
    assert losses[0][:2] == losses[1][:2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_other_data_are_accepted_where_it_is_said(
    interrupted: Path, copy: Path, tmp_path: Path, run_main: Main
) -> None:
    """Their first epoch begins at once; what is computed says so in the checkpoint, and a further resume is exact."""
    records = (interrupted / "train.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(records.replace("blue", "bleu"))
    settings = (f"output.dir={copy}", f"data.train={tmp_path / 'other.jsonl'}", "data.accept_changed=true")
    status, err = run_main(
        "--config", interrupted / "run.yaml", "--resume", *(x for setting in settings for x in ("--set", setting))
    )
    assert status == 0, err
    meta = json.loads((copy / "checkpoints" / "6" / "meta.json").read_text())["record"]["meta"]
    assert meta["data_position"]["epoch"] >= 1
    assert [record["step"] for record in computed(copy) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_files_may_move(
    interrupted: Path, copy: Path, base_model: Path, tmp_path: Path, run_main: Main, no_training: None
) -> None:
    """Base model and data are known by their content: what stops this run is the refusal to load or trace, after all
    checks."""
    moved = shutil.copytree(base_model, tmp_path / "moved")
    data = shutil.copy(interrupted / "train.jsonl", tmp_path / "moved.jsonl")
    settings = [f"output.dir={copy}", f"model.name_or_path={moved}", f"data.train={data}"]
    with pytest.raises(AssertionError, match="was called"):
        run_main("--config", interrupted / "run.yaml", "--resume", *(x for s in settings for x in ("--set", s)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["lora.r=8"], ["lora.r: 48 then, 8 now"]),
        (
            ["train.learning_rate=0.02", "train.max_steps=7", "lora.lora_dropout=0.0"],
            ["train.learning_rate: 0.01 then, 0.02 now", "train.max_steps: 6", "lora.lora_dropout: 0.1"],
        ),
        (["data.max_length=48"], ["data.max_length: 64 then, 48 now"]),
        (["data.train={tmp}/other.jsonl"], ["the data's content"]),
        (["model.name_or_path={tmp}/other"], ["the base model's content"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_another_run_is_refused(
    settings: list[str],
    named: list[str],
    interrupted: Path,
    copy: Path,
    tmp_path: Path,
    run_main: Main,
    no_training: None,
) -> None:
    save_model(tmp_path / "other", seed=1)
    records = (interrupted / "train.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(records.replace("blue", "bleu", 1))
    before = contents(copy)
    overrides = [setting.format(tmp=tmp_path) for setting in [f"output.dir={copy}", *settings]]
    status, err = run_main(
        "--config", interrupted / "run.yaml", "--resume", *(x for override in overrides for x in ("--set", override))
    )
    assert status == 2
    assert "error: cannot resume: the checkpoint of step 3 is of a run that differs" in err
    assert all(name in err for name in named), err
    assert err.rstrip().endswith("or start a new run in another output.dir")
    assert contents(copy) == before


def test_nothing_to_resume_from(write_run: WriteRun, tmp_path: Path, run_main: Main, no_training: None) -> None:
    config = write_run()
    for _ in range(2):
        status, err = run_main("--config", config, "--resume")
        assert status == 2
        assert f"error: --resume: no complete checkpoint in {tmp_path / 'out' / 'checkpoints'}; run the same" in err
        (tmp_path / "out" / "checkpoints" / ".tmp-3").mkdir(parents=True, exist_ok=True)


LEFT = {
    "adapter": ("adapter", "holds adapter, but no checkpoint"),
    "metrics": ("metrics.jsonl", "holds metrics.jsonl, but no checkpoint"),
    "a foreign file": ("config.yaml", "holds the beginning of another run ("),
}


@pytest.mark.parametrize(("left", "named"), LEFT.values(), ids=LEFT.keys())
def test_what_is_not_this_run_s_beginning_stays(
    left: str, named: str, write_run: WriteRun, tmp_path: Path, run_main: Main, no_training: None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_text(json.dumps({"step": 1}))
    before = contents(tmp_path / "out")
    status, err = run_main("--config", write_run())
    assert status == 2
    assert f"error: output.dir {tmp_path / 'out'} {named}" in err
    assert "; delete what is there, or name another with --set output.dir=..." in err
    assert contents(tmp_path / "out") == before


def test_beginning_of_a_run_with_other_settings_stays(
    write_run: WriteRun, tmp_path: Path, run_main: Main, no_training: None
) -> None:
    config = write_run()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(dump_yaml(load_config(config)))
    before = contents(tmp_path / "out")
    status, err = run_main("--config", config, "--set", "lora.r=8", "--set", "train.logging_steps=5")
    assert status == 2
    assert "holds the beginning of a run that differs in lora.r: 48 then, 8 now; delete what is there, or name" in err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("arguments", [[], ["--resume", "auto"]], ids=["plain", "auto"])
def test_run_killed_before_its_first_checkpoint_starts_again(
    arguments: list[str], write_run: WriteRun, tmp_path: Path, run_main: Main
) -> None:
    """The same command as before is enough; other files in the directory stay."""
    config, output = write_run(train={"max_steps": 1}), tmp_path / "out"
    (output / "checkpoints" / ".tmp-1").mkdir(parents=True)
    (output / "config.yaml").write_text(dump_yaml(load_config(config)))
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"st')
    (output / ".lock").write_text("")
    (output / "notes.txt").write_text("mine")
    status, err = run_main("--config", config, *arguments)
    assert status == 0, err
    assert [record["step"] for record in computed(output) if "loss" in record] == [1]
    assert computed(output)[-1]["loss"] != 5.0
    names = ["adapter", "checkpoints", "config.yaml", "metrics.jsonl", "notes.txt", "report.html"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["1"]


def test_resume_auto_goes_on_and_never_starts_over_what_cannot_be_read(
    interrupted: Path, copy: Path, run_main: Main, no_training: None
) -> None:
    arguments = ["--config", interrupted / "run.yaml", "--set", f"output.dir={copy}", "--resume", "auto"]
    with pytest.raises(AssertionError, match="was called"):
        run_main(*arguments)
    (copy / "checkpoints" / "3" / "meta.json").write_text("{")
    with pytest.warns(UserWarning, match="3 is damaged: meta.json"):
        status, err = run_main(*arguments)
    assert status == 2
    assert "error: there is no readable checkpoint in" in err


def test_second_run_in_the_same_directory_is_refused(write_run: WriteRun, tmp_path: Path, run_main: Main) -> None:
    config = write_run()
    with RunDirectory(load_config(config)):
        status, err = run_main("--config", config)
    assert status == 2
    assert f"error: output.dir {tmp_path / 'out'} is in use by another run " in err
    assert f'"process": {os.getpid()}' in err
    assert "wait until it ends, or name another" in err
    assert not (tmp_path / "out").exists()


def test_new_run_never_overwrites_another(interrupted: Path, copy: Path, run_main: Main, no_training: None) -> None:
    before = contents(copy)
    status, err = run_main("--config", interrupted / "run.yaml", "--set", f"output.dir={copy}")
    assert status == 2
    assert f"error: output.dir {copy} holds a run already; continue it with --resume, or name another" in err
    assert contents(copy) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_ends_in_one_message_and_the_run_goes_on(write_run: WriteRun, tmp_path: Path, run_main: Main) -> None:
    """No file may grow beyond 40 kB: the first save fails, and the same command with room goes through."""
    config = write_run(train={"max_steps": 2}, output={"save_steps": 1, "compile_cache": None})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        status, err = run_main("--config", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert f"error: cannot write the checkpoint {tmp_path / 'out' / 'checkpoints' / '1'}: " in err
    assert err.endswith("earlier ones are untouched. Make room there, or change output.dir\n")
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "adapter").exists()
    status, err = run_main("--config", config, "--resume", "auto")
    assert status == 0, err
    assert [record["step"] for record in computed(tmp_path / "out") if "loss" in record] == [1, 2]
