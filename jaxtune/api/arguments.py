"""TrainingArguments and SFTConfig: transformers' and TRL's names for what a run's configuration says."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.api.foreign import Foreign, ignored, refused, settle
from jaxtune.errors import UserError, shown
from jaxtune.trackers import MODULES

# Names of the same optimizer, with state in 8 bits or in float32.
OPTIMIZERS = {
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw_32bit": "adamw",
}
SCHEDULES = {"constant_with_warmup": "constant"}

_LOADING = "batches are made of rows that are in memory already"
_DISPLAY = "metrics.jsonl in output_dir has every step"
_COMPILED = "the step is always compiled"
FOREIGN: dict[str, Foreign] = {
    "auto_find_batch_size": refused("set per_device_train_batch_size; `python -m jaxtune.plan` says what fits", False),
    "callbacks": refused("there are no callbacks"),
    "data_seed": refused("seed decides the order of the data as well"),
    "deepspeed": refused("a run is on one host"),
    "dft_loss": refused("the loss is cross-entropy", False),
    "eos_token": refused("the tokenizer's own ends a text"),
    "fsdp": refused("a run is on one device", "", False, []),
    "fsdp_config": refused("a run is on one device", {}),
    "group_by_length": refused("packing=True is what keeps padding away", False),
    "hub_model_id": refused("upload the directory with `hf upload`"),
    "label_smoothing_factor": refused("the loss is cross-entropy", 0, 0.0),
    "load_best_model_at_end": refused("the last state is kept; lower max_steps", False),
    "loss_type": refused("the loss is cross-entropy", "nll"),
    "lr_scheduler_kwargs": refused("schedules end at zero", {}),
    "max_loss": refused("all losses count"),
    "model_init_kwargs": refused("give them to FastLanguageModel.from_pretrained", {}),
    "neftune_noise_alpha": refused("embeddings get no noise"),
    "optim_args": refused("adam_beta1, adam_beta2 and adam_epsilon are arguments of their own"),
    "optim_target_modules": refused("the optimizer is AdamW"),
    "overwrite_output_dir": refused("delete output_dir yourself, or name another", False),
    "padding_free": refused("use packing=True: documents in a row do not see each other", False),
    "push_to_hub": refused("upload the directory with `hf upload`", False),
    "sft_formatting_func": refused("give formatting_func to SFTTrainer"),
    "activation_offloading": refused("use get_peft_model(use_gradient_checkpointing='unsloth')", False),
    "batch_eval_metrics": ignored("the held-out loss is what is measured", False),
    "average_tokens_across_devices": ignored("a token always weighs the same in an update", True, False),
    "dataloader_drop_last": ignored("a batch may end one epoch and begin the next", False),
    "dataloader_num_workers": ignored(_LOADING, 0),
    "dataloader_persistent_workers": ignored(_LOADING, False),
    "dataloader_pin_memory": ignored(_LOADING, True, False),
    "dataloader_prefetch_factor": ignored(_LOADING),
    "dataset_batch_size": ignored("records are tokenised in batches of a fixed size"),
    "dataset_kwargs": refused("the columns of the data say what they are", {}),
    "dataset_num_proc": ignored("the tokenizer uses all cores by itself", 1),
    "ddp_find_unused_parameters": ignored("a run is on one device", False),
    "disable_tqdm": ignored("plain lines are printed where there is no terminal", False),
    "do_eval": ignored("eval_dataset and eval_strategy say it", True, False),
    "do_train": ignored("trainer.train() says it", True, False),
    "eval_accumulation_steps": ignored("no predictions are gathered"),
    "eval_packing": ignored("the held-out data are packed as the training data are"),
    "fp16_full_eval": ignored("evaluation computes as training does", False),
    "bf16_full_eval": ignored("evaluation computes as training does", False),
    "gradient_checkpointing": ignored("it is set with get_peft_model(use_gradient_checkpointing=...)", False),
    "gradient_checkpointing_kwargs": ignored("it is set with get_peft_model(use_gradient_checkpointing=...)", {}),
    "include_num_input_tokens_seen": ignored(_DISPLAY, False, "no"),
    "label_names": ignored("labels come from the data"),
    "log_level": ignored(_DISPLAY, "passive"),
    "logging_dir": ignored(_DISPLAY),
    "logging_first_step": ignored(_DISPLAY, True, False),
    "logging_nan_inf_filter": ignored("a loss that is not finite ends the run", False),
    "logging_strategy": ignored(_DISPLAY, "steps"),
    "metric_for_best_model": ignored("the last state is kept"),
    "greater_is_better": ignored("the last state is kept"),
    "packing_strategy": ignored("documents are never cut by packing", "bfd"),
    "per_device_eval_batch_size": ignored("the held-out loss is measured in batches of the training size"),
    "prediction_loss_only": ignored("the held-out loss is what is measured", True),
    "remove_unused_columns": ignored("only the columns that are needed are read", True, False),
    "run_name": ignored("runs are told apart by output_dir"),
    "save_only_model": ignored("checkpoints are what a run resumes from", False),
    "save_safetensors": ignored("safetensors are written", True),
    "skip_memory_metrics": ignored(_DISPLAY, True),
    "tf32": ignored("products are computed in the model's dtype"),
    "torch_compile": ignored(_COMPILED, False),
    "torch_empty_cache_steps": ignored("memory is not fragmented by steps of one program"),
    "use_cpu": ignored("set JAX_PLATFORMS=cpu before the start", False),
    "use_liger_kernel": ignored("the best implementation of each op is chosen by itself", False),
}


@dataclasses.dataclass(init=False)
class TrainingArguments:
    """How a run goes. Names, meanings and, unless said otherwise, defaults are transformers'; all but output_dir are
    given by name.

    output_dir: must not hold another run. per_device_train_batch_size: rows of a micro-batch.
    gradient_accumulation_steps: micro-batches of an update. max_steps: updates; -1 lets num_train_epochs count.
    learning_rate: peak. lr_scheduler_type: linear, cosine, constant (which warms up too), or another of jaxtune's.
    warmup_steps, warmup_ratio: updates until the peak, or their share (rounded up); one of them.
    optim: adamw_8bit (also adamw_bnb_8bit), paged_adamw_8bit, adamw (also adamw_torch, adamw_torch_fused), or another
        of jaxtune's.
    max_grad_norm: 0 for no clipping. seed: of the data's order and of dropout.
    fp16, bf16: compared with the dtype that the model was loaded to compute in, which holds.
    logging_steps: between lines where there is no terminal (default 1). save_strategy: steps, epoch or no (one
    checkpoint at the end). save_total_limit: checkpoints kept (default 2). eval_strategy: no (before and after
        training only), steps or epoch. eval_steps: updates between two; logging_steps by default.
    report_to: "none", or services that are given the metrics, too: "tensorboard", "wandb", "trackio", one or several;
        metrics.jsonl is always written.
    overrides: any other setting of a run by its dotted name, such as {"output.sample_prompts": ["Who are you?"]}.
    """

    output_dir: str = "trainer_output"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    optim: str = "adamw_torch"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42
    fp16: bool = False
    bf16: bool = False
    logging_steps: int = 1
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    eval_strategy: str = "no"
    eval_steps: int | None = None
    report_to: Any = "none"
    overrides: Mapping[str, Any] | None = None

    def __init__(self, output_dir: str | Path | None = None, **values: Any) -> None:
        name = type(self).__name__
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        if "evaluation_strategy" in values:
            values["eval_strategy"] = values.pop("evaluation_strategy")
        settle(name, {key: value for key, value in values.items() if key not in fields}, FOREIGN, fields)
        given = {key: value for key, value in values.items() if key in fields}
        if output_dir is not None:
            given["output_dir"] = str(output_dir)
        for key, default in fields.items():
            # An enum of transformers stands for its text.
            value = given.get(key, default)
            setattr(self, key, getattr(value, "value", value))
        self.given = frozenset(given)
        self._check()

    def _check(self) -> None:
        name = type(self).__name__
        for key, choices in (("save_strategy", ("no", "steps", "epoch")), ("eval_strategy", ("no", "steps", "epoch"))):
            if getattr(self, key) not in choices:
                raise UserError(f"{name}: {key}={shown(getattr(self, key))}; it must be one of {', '.join(choices)}")
        if unknown := set(self.services) - set(MODULES):
            raise UserError(
                f"{name}: report_to={shown(self.report_to)} is not supported ({', '.join(sorted(map(str, unknown)))}); "
                f"it must be 'none' or among {', '.join(MODULES)}; metrics.jsonl in output_dir has every step"
            )
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {key}={shown(value)}; it must be a whole number above 0")
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(f"{name}: warmup_steps and warmup_ratio both say how long; keep one of them")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"{name}: warmup_ratio={shown(self.warmup_ratio)}; it must be at least 0 and below 1")
        if self.fp16 and self.bf16:
            raise UserError(f"{name}: fp16 and bf16 are both asked for; keep one of them")

    @property
    def services(self) -> tuple[str, ...]:
        """The names in `report_to`."""
        asked = (self.report_to,) if isinstance(self.report_to, str | None) else tuple(self.report_to)
        return tuple(name for name in asked if name not in ("none", None))

    def train_section(self, steps_per_epoch: float) -> dict[str, Any]:
        """The keys of a run's `train` section, but for those that the model has.

        steps_per_epoch: updates that one pass over the rows takes.
        """
        if self.optim == "paged_adamw_32bit":
            message = f"optim={self.optim!r} is not paged: the optimizer's state stays on the device"
            warnings.warn(message, UserWarning, stacklevel=2)
        max_steps = self.max_steps if self.max_steps is not None and self.max_steps > 0 else None
        total = max_steps or self.num_train_epochs * steps_per_epoch
        # transformers takes a number of steps below one as a share.
        share = self.warmup_ratio or (self.warmup_steps if self.warmup_steps < 1 else 0)
        # Less what binary fractions add to a product that is whole.
        warmup = math.ceil(share * total - 1e-9) if share else self.warmup_steps
        by_steps = self.eval_steps or self.logging_steps
        every = {"no": None, "epoch": _whole(steps_per_epoch), "steps": by_steps}[self.eval_strategy]
        return {
            "batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_train_epochs": self.num_train_epochs,
            "max_steps": max_steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": SCHEDULES.get(self.lr_scheduler_type, self.lr_scheduler_type),
            "warmup_steps": warmup,
            "optim": OPTIMIZERS.get(self.optim, self.optim),
            "weight_decay": self.weight_decay,
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "adam_epsilon": self.adam_epsilon,
            "max_grad_norm": self.max_grad_norm or None,
            "seed": self.seed,
            "logging_steps": self.logging_steps,
            "eval_steps": every,
        }

    def output_section(self, steps_per_epoch: float) -> dict[str, Any]:
        """The keys of a run's `output` section; programs are not cached, as that is the process's to decide."""
        every = {"no": None, "epoch": _whole(steps_per_epoch), "steps": self.save_steps}[self.save_strategy]
        kept = {} if self.save_total_limit is None else {"save_total_limit": self.save_total_limit}
        return {"dir": self.output_dir, "save_steps": every, "compile_cache": None, "report_to": self.services, **kept}


@dataclasses.dataclass(init=False)
class SFTConfig(TrainingArguments):
    """TRL's arguments for supervised fine-tuning, above those of TrainingArguments.

    learning_rate: 2e-5 here, as in TRL. dataset_text_field: column of whole texts.
    max_length, max_seq_length: tokens of a row, by either name; None takes the model's max_seq_length.
    overlong: what happens to a longer document: truncate (TRL's way; the count is shown), drop, split or error.
    packing: several documents in a row, which do not see each other.
    assistant_only_loss: of conversations, learn only the assistant's turns. completion_only_loss: of prompt and
        completion, learn only the completion; None means True, as in TRL.
    chat_template_path: a chat template by name or file, instead of the tokenizer's own.
    """

    learning_rate: float = 2e-5
    dataset_text_field: str = "text"
    max_length: int | None = None
    max_seq_length: int | None = None
    overlong: str = "truncate"
    packing: bool = False
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    chat_template_path: str | None = None

    def _check(self) -> None:
        super()._check()
        if None not in (self.max_length, self.max_seq_length) and self.max_length != self.max_seq_length:
            raise UserError(
                f"SFTConfig: max_length={self.max_length} and max_seq_length={self.max_seq_length} are one setting; "
                "keep one of them"
            )

    @classmethod
    def extending(cls, arguments: TrainingArguments | None, values: Mapping[str, Any]) -> SFTConfig:
        """These arguments with further ones; a value given in both places must be the same.

        Raises:
            UserError: two values for one argument.
        """
        given = {} if arguments is None else {name: getattr(arguments, name) for name in arguments.given}
        for name, value in values.items():
            if name in given and given[name] != value:
                raise UserError(
                    f"SFTTrainer: {name}={shown(value)}, but args has {shown(given[name])}; keep one of them"
                )
        if isinstance(arguments, TrainingArguments) and not isinstance(arguments, SFTConfig):
            # Its defaults are its own.
            given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
        return cls(**{**given, **values})


def _whole(steps_per_epoch: float) -> int:
    """Updates between the ends of two epochs, of which some may lie within an update."""
    return max(1, round(steps_per_epoch))
