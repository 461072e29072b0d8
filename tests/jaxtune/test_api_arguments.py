"""What the API makes of the arguments of Unsloth, TRL, PEFT and transformers."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import pytest

from jaxtune import SFTConfig, TrainingArguments, UserError
from jaxtune.api.foreign import Foreign, ignored, refused, settle
from jaxtune.config_io import from_dict


def sections(args: TrainingArguments, steps_per_epoch: float = 10.0) -> Any:
    """The run that the arguments make, checked as a file's would be."""
    raw = {
        "model": {"name_or_path": "-"},
        "data": {"train": "-", "eval": "-"},
        "train": args.train_section(steps_per_epoch),
        "output": args.output_section(steps_per_epoch),
    }
    return from_dict(raw)


def test_defaults_are_those_of_transformers() -> None:
    run = sections(TrainingArguments())
    assert (run.train.batch_size, run.train.num_train_epochs, run.train.max_steps) == (8, 3.0, None)
    assert (run.train.learning_rate, run.train.optim, run.train.weight_decay) == (5e-5, "adamw", 0.0)
    assert (run.train.lr_scheduler_type, run.train.warmup_steps, run.train.seed) == ("linear", 0, 42)
    assert (run.output.save_steps, run.output.dir, run.output.report_to) == (500, "trainer_output", ())
    assert SFTConfig().learning_rate == 2e-5


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"warmup_ratio": 0.1, "max_steps": 100}, "warmup_steps", 10),
        ({"warmup_ratio": 0.25, "num_train_epochs": 1}, "warmup_steps", 3),
        ({"warmup_steps": 0.2, "max_steps": 20}, "warmup_steps", 4),
        ({"max_steps": -1}, "max_steps", None),
        ({"max_grad_norm": 0}, "max_grad_norm", None),
        ({"optim": "adamw_bnb_8bit"}, "optim", "adamw_8bit"),
        ({"optim": "paged_adamw_8bit"}, "optim", "paged_adamw_8bit"),
        ({"optim": enum.Enum("Names", {"A": "adamw_torch"}).A}, "optim", "adamw"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "lr_scheduler_type", "constant"),
        ({"evaluation_strategy": "steps", "eval_steps": 7}, "eval_steps", 7),
        ({"eval_strategy": "epoch"}, "eval_steps", 10),
        ({"eval_steps": 7}, "eval_steps", None),
    ],
)
def test_what_a_run_gets(given: dict[str, Any], key: str, value: Any) -> None:
    assert getattr(sections(TrainingArguments("out", **given)).train, key) == value


def test_services() -> None:
    assert sections(TrainingArguments(report_to="tensorboard")).output.report_to == ("tensorboard",)
    assert sections(TrainingArguments(report_to=["wandb", "none"])).output.report_to == ("wandb",)
    assert sections(TrainingArguments(report_to=None)).output.report_to == ()
    with pytest.raises(UserError, match=r"report_to='all' is not supported \(all\); it must be 'none' or among"):
        TrainingArguments(report_to="all")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"learning_rat": 1e-4}, "unknown argument learning_rat=0.0001; did you mean learning_rate"),
        ({"push_to_hub": True}, "push_to_hub=True is not supported: upload"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha=5 is not supported: embeddings get no noise"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both asked for"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "keep one of them"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0; it must be a whole number above 0"),
        ({"warmup_ratio": 1.5}, "at least 0 and below 1"),
        ({"save_strategy": "sometimes"}, "must be one of no, steps, epoch"),
    ],
)
def test_what_cannot_be_meant(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        TrainingArguments("out", **given)


def test_arguments_without_effect_are_named() -> None:
    with pytest.warns(UserWarning, match="optim='paged_adamw_32bit' is not paged"):
        assert sections(TrainingArguments("out", optim="paged_adamw_32bit")).train.optim == "adamw"
    with pytest.warns(UserWarning, match="TrainingArguments: logging_dir='logs' has no effect"):
        TrainingArguments("out", logging_dir="logs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingArguments("out", logging_strategy="steps", push_to_hub=False, hub_model_id=None)


def test_sft_config_extends_arguments() -> None:
    extended = SFTConfig.extending(TrainingArguments("out", learning_rate=1e-3), {"packing": True})
    assert (extended.learning_rate, extended.packing, extended.optim) == (1e-3, True, "adamw_torch")
    # The defaults of TrainingArguments stay its own.
    assert SFTConfig.extending(TrainingArguments("out"), {}).learning_rate == 5e-5
    with pytest.raises(UserError, match="packing=True, but args has False"):
        SFTConfig.extending(SFTConfig("out", packing=False), {"packing": True})
    with pytest.raises(UserError, match="are one setting"):
        SFTConfig("out", max_length=64, max_seq_length=128)


def test_settle() -> None:
    """A value that asks for nothing passes; 0 is not False; what is refused is refused whatever it is."""
    rules: dict[str, Foreign] = {"noise": refused("there is none", 0), "threads": ignored("all are used", False)}
    settle("f", {"noise": 0, "threads": False}, rules, ())
    settle("f", {"noise": None, "threads": None}, rules, ())
    with pytest.warns(UserWarning, match="f: threads=0 has no effect: all are used"):
        settle("f", {"threads": 0}, rules, ())
    with pytest.raises(UserError, match="noise=False is not supported"):
        settle("f", {"noise": False}, rules, ())
    with pytest.raises(UserError, match="f: unknown argument threds=1; did you mean threads"):
        settle("f", {"threds": 1}, rules, ("threads",))
