"""SFTTrainer: TRL's trainer as a door to the one engine, `jaxtune.train.fit`."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from jaxtune.api.arguments import FOREIGN, SFTConfig, TrainingArguments
from jaxtune.api.foreign import Foreign, ignored, refused, settle
from jaxtune.api.model import Model
from jaxtune.config import RunConfig
from jaxtune.config_data import IN_MEMORY
from jaxtune.config_io import from_dict
from jaxtune.data.dataset import Dataset, build
from jaxtune.data.loader import Loader
from jaxtune.data.sources import from_memory
from jaxtune.errors import UserError, shown
from jaxtune.evaluation import held_out
from jaxtune.host_embedding import HostEmbedding
from jaxtune.lora import init_lora
from jaxtune.metrics import Progress, read_metrics
from jaxtune.run_directory import RunDirectory
from jaxtune.step import batch_sharding, jit_eval_step, make_mesh
from jaxtune.structure import step_settings
from jaxtune.trackers import check_installed
from jaxtune.train import fit

if TYPE_CHECKING:
    import datasets

# Collators that pad, or shift labels as every causal model does: what batches are here anyway.
_PLAIN_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DataCollatorWithPadding")
_IN_ARGS = "give it in args"
SFT_TRAINER: dict[str, Foreign] = {
    "callbacks": FOREIGN["callbacks"],
    "compute_metrics": refused("the held-out loss is what is measured"),
    "compute_loss_func": refused("the loss is cross-entropy"),
    "model_init": refused("load the model with FastLanguageModel.from_pretrained"),
    "model_init_kwargs": FOREIGN["model_init_kwargs"],
    "optimizer_cls_and_kwargs": refused("name one with optim"),
    "optimizers": refused("name one with optim and lr_scheduler_type", (None, None)),
    "peft_config": refused("put the adapter on with FastLanguageModel.get_peft_model"),
    "preprocess_logits_for_metrics": refused("the held-out loss is what is measured"),
    "dataset_num_proc": FOREIGN["dataset_num_proc"],
    "dataset_batch_size": FOREIGN["dataset_batch_size"],
    "dataset_kwargs": FOREIGN["dataset_kwargs"],
    "eval_packing": FOREIGN["eval_packing"],
    "neftune_noise_alpha": FOREIGN["neftune_noise_alpha"],
    "num_of_sequences": ignored("rows are made from all records"),
    "chars_per_token": ignored("rows are made from all records"),
}


class TrainOutput(NamedTuple):
    """What `SFTTrainer.train` returns, as in transformers. metrics: train_runtime (s), train_loss and others."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class SFTTrainer:
    """Supervised fine-tuning of a model's adapter.

    model: with an adapter, from FastLanguageModel.get_peft_model. tokenizer, processing_class: one name or the other;
    None takes the model's. train_dataset, eval_dataset: of the datasets library, or sequences of mappings, in any form
    that docs/data.md lists. formatting_func: makes the text of a record, or the texts of a mapping of columns.
    dataset_text_field, max_seq_length, packing: as in SFTConfig, where they may be given instead. args: the rest.

    Raises:
        UserError: arguments that do not fit together, or that have no counterpart.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any = None,
        train_dataset: datasets.Dataset | Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: datasets.Dataset | Sequence[Mapping[str, Any]] | None = None,
        *,
        args: TrainingArguments | None = None,
        processing_class: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        data_collator: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        **others: Any,
    ) -> None:
        known = ("model", "tokenizer", "train_dataset", "eval_dataset", "args", "formatting_func", "packing")
        settle("SFTTrainer", others, SFT_TRAINER, known)
        if not isinstance(model, Model) or model.lora_config is None:
            raise UserError(
                f"SFTTrainer: model is {shown(model)}; it must be one with an adapter, made by "
                "FastLanguageModel.from_pretrained and FastLanguageModel.get_peft_model"
            )
        if train_dataset is None:
            raise UserError("SFTTrainer: train_dataset is missing")
        if args is not None and not isinstance(args, TrainingArguments):
            raise UserError(
                f"SFTTrainer: args is a {type(args).__module__}.{type(args).__name__}; import SFTConfig or "
                "TrainingArguments from jaxtune"
            )
        if data_collator is not None and type(data_collator).__name__ not in _PLAIN_COLLATORS:
            raise UserError(
                f"SFTTrainer: data_collator={type(data_collator).__name__} is not supported; to learn the responses "
                "alone, use train_on_responses_only"
            )
        if data_collator is not None:
            warnings.warn(
                f"SFTTrainer: data_collator={type(data_collator).__name__} has no effect: rows are laid out here",
                UserWarning,
                stacklevel=2,
            )
        extra = {"dataset_text_field": dataset_text_field, "max_seq_length": max_seq_length, "packing": packing}
        self.args = SFTConfig.extending(args, {name: value for name, value in extra.items() if value is not None})
        self.model = model
        self.tokenizer = next((one for one in (tokenizer, processing_class) if one is not None), model.base.tokenizer)
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"SFTTrainer: tokenizer is {shown(self.tokenizer)}; it must be the one of from_pretrained, or another "
                "of transformers (not a processor, of which it may be the .tokenizer)"
            )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.formatting_func = formatting_func
        self.responses: dict[str, Any] = {}
        """Keys of the data section that say what is learnt; see train_on_responses_only."""
        self.log_history: list[dict[str, Any]] = []
        """The records of metrics.jsonl, once trained."""
        self._check_dtype()

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Train to the end; the model then has the trained adapter.

        resume_from_checkpoint: True continues from the newest checkpoint in output_dir; "auto" does so if there is one.

        Raises:
            UserError: something to fix; before any long work wherever that is possible.
            Interrupted: stopped by Ctrl-C or SIGTERM; what was done is saved in output_dir.
        """
        if resume_from_checkpoint not in (None, False, True, "auto"):
            raise UserError(
                f"train: resume_from_checkpoint={shown(resume_from_checkpoint)}; it must be True (the newest "
                "checkpoint in output_dir), 'auto' or None"
            )
        started = time.perf_counter()
        check_installed(self.args.services)
        train_data, eval_data = self._datasets()
        config = self.run_config(train_data)
        model = self.model
        own = None if model.base.own_tokenizer is None else self.tokenizer
        base = dataclasses.replace(
            model.base, tokenizer=self.tokenizer, own_tokenizer=own, load=lambda place=None, progress=None: model.frozen
        )
        # The step works in place: it gets a copy.
        lora = None if model.lora is None else jax.tree.map(jnp.copy, model.lora)
        resume: Any = resume_from_checkpoint or False
        with Progress(config.train.logging_steps) as progress, RunDirectory(config, resume) as directory:
            outcome = fit(config, base, train_data, eval_data, lora=lora, directory=directory, progress=progress)
        model.lora = outcome.lora
        self.log_history = read_metrics(directory.metrics)
        losses = [record["loss"] for record in self.log_history if "loss" in record]
        loss = sum(losses) / len(losses) if losses else float("nan")
        seconds = time.perf_counter() - started
        metrics = {"train_runtime": seconds, "train_loss": loss, "train_steps_per_second": len(losses) / seconds}
        if outcome.eval_loss is not None:
            metrics["eval_loss"] = outcome.eval_loss
        return TrainOutput(outcome.steps, loss, metrics)

    def evaluate(self) -> dict[str, float]:
        """The held-out loss of the model as it is now, and its perplexity.

        Raises:
            UserError: the trainer has no eval_dataset.
        """
        train_data, eval_data = self._datasets()
        if eval_data is None:
            raise UserError("evaluate: there is nothing to measure on; give SFTTrainer an eval_dataset")
        config, base, mesh = self.run_config(train_data), self.model.base, make_mesh(1, 1, 1)
        step = jit_eval_step(step_settings(config, base.decoder, base.dtype, "none"), mesh)
        lora = init_lora(config.lora, base.decoder) if self.model.lora is None else self.model.lora
        embedding = HostEmbedding(self.model.frozen) if config.model.embedding_on_host else None
        frozen = self.model.frozen if embedding is None else embedding.without_table

        def place(batch: Any) -> Any:
            rows = {} if embedding is None else {"embedded": embedding.rows(batch["tokens"], batch_sharding(mesh))}
            return {**jax.device_put(batch, batch_sharding(mesh)), **rows}

        return held_out({"eval": eval_data}, config.train.batch_size, place, step, lora, frozen)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the adapter and the tokenizer, to output_dir/adapter of the run if no directory is named, which
        replaces what training has left there."""
        if output_dir is None:
            self.model.save_pretrained(Path(self.args.output_dir) / "adapter", self.tokenizer, overwrite=True)
        else:
            self.model.save_pretrained(output_dir, self.tokenizer)

    def run_config(self, train_data: Dataset | None = None) -> RunConfig:
        """The run as `python -m jaxtune.train` would have it in a file."""
        train_data = self._datasets()[0] if train_data is None else train_data
        args = self.args
        size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        per_epoch = Loader(train_data, size, accumulation, args.seed).steps_per_epoch
        return self._overridden(
            {
                "model": dataclasses.asdict(self.model.config),
                "lora": dataclasses.asdict(self.model.lora_config),  # type: ignore[arg-type]  # checked above
                "data": self._data_section(),
                "train": {
                    **args.train_section(per_epoch),
                    "remat": self.model.remat,
                    "memory_limit": self.model.memory_limit,
                },
                "output": args.output_section(per_epoch),
            }
        )

    def _datasets(self) -> tuple[Dataset, Dataset | None]:
        needed = {"model": {"name_or_path": "-"}, "output": {"dir": "-"}}
        config = self._overridden({**needed, "data": self._data_section()}).data
        function = None if self.formatting_func is None else _of_one_record(self.formatting_func)
        train, held_out = (
            None if records is None else build(config, self.tokenizer, split, records=records, formatting_func=function)
            for split, records in (("train", self.train_dataset), ("eval", self.eval_dataset))
        )
        assert train is not None
        return train, held_out

    def _data_section(self) -> dict[str, Any]:
        args, form = self.args, self.form
        learns_all = {"completion": args.completion_only_loss is False, "text": True}
        return {
            "train": IN_MEMORY,
            "eval": None if self.eval_dataset is None else IN_MEMORY,
            "form": form,
            "text_field": args.dataset_text_field,
            "train_on": "all" if learns_all.get(form, not args.assistant_only_loss) else "responses",
            "chat_template": args.chat_template_path,
            "max_length": args.max_length or args.max_seq_length or self.model.max_seq_length,
            "packing": args.packing,
            "overlong": args.overlong,
            **self.responses,
        }

    @property
    def form(self) -> str:
        """What the records are, as data.form names it: conversations, then prompts with completions, then texts, which
        is the order of TRL; dataset_text_field comes first if it was given."""
        if self.formatting_func is not None:
            return "text"
        columns = from_memory(self.train_dataset).columns
        by_columns = {"messages": ("messages",), "sharegpt": ("conversations",), "completion": ("prompt", "completion")}
        if self.args.dataset_text_field in columns and "dataset_text_field" in self.args.given:
            return "text"
        for form, needed in by_columns.items():
            if set(needed) <= set(columns):
                return form
        return "text" if self.args.dataset_text_field in columns else "auto"

    def _overridden(self, raw: dict[str, Any]) -> RunConfig:
        """The sections with `overrides` in them, checked."""
        for key, value in (self.args.overrides or {}).items():
            section, _, name = key.partition(".")
            raw[section] = {**raw.get(section, {}), name: value}
        return from_dict(raw)

    def _check_dtype(self) -> None:
        computed = self.model.base.dtype
        for flag, dtype in (("fp16", jnp.float16), ("bf16", jnp.bfloat16)):
            if getattr(self.args, flag) and computed != dtype:
                warnings.warn(
                    f"SFTTrainer: {flag}=True has no effect: the model was loaded to compute in {computed.name}; "
                    "from_pretrained(dtype=...) decides",
                    UserWarning,
                    stacklevel=3,
                )


def train_on_responses_only(
    trainer: SFTTrainer, instruction_part: str | None = None, response_part: str | None = None, **others: Any
) -> SFTTrainer:
    """Let a trainer learn the assistant's turns alone.

    Args:
        instruction_part, response_part: texts that begin a user's and an assistant's turn, such as
            "<|start_header_id|>user<|end_header_id|>\\n\\n"; what stands between a response_part and the next
            instruction_part is learnt. None for both: of conversations, what the chat template says is the assistant's.

    Raises:
        UserError: only one of the parts, or none with texts, where nothing says what is a response.
    """
    foreign = {
        "tokenizer": ignored("the trainer has one"),
        "num_proc": ignored("masks are made with the tokens"),
        "force_match": ignored("the parts are found in the text, not in tokens", True),
        "return_function": refused("the trainer is returned", False),
        "last_response_only": refused("set overrides={'data.train_on': 'last_response'} in SFTConfig", False),
    }
    settle("train_on_responses_only", others, foreign, ("trainer", "instruction_part", "response_part"))
    if (instruction_part is None) != (response_part is None):
        raise UserError("train_on_responses_only: instruction_part and response_part belong together; give both")
    if instruction_part is None and trainer.form == "text":
        raise UserError(
            "train_on_responses_only: nothing says where in a text the responses are; give instruction_part and "
            "response_part, or train on conversations (a column messages)"
        )
    trainer.responses = {
        "train_on": "responses",
        "instruction_part": instruction_part,
        "response_part": response_part,
    }
    return trainer


def _of_one_record(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    """A formatting function for one record, from one for a record or for a mapping of columns, as TRL takes both."""

    def text(record: Mapping[str, Any]) -> Any:
        made = function(record)
        if not isinstance(made, list):
            return made
        made = function({name: [value] for name, value in record.items()})
        if not isinstance(made, list) or len(made) != 1:
            raise UserError(
                f"formatting_func gives {shown(made)} for one record; it must give a text for a record, or a list of "
                "texts for a mapping of columns"
            )
        return made[0]

    return text
