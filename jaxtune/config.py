"""The configuration of a run: frozen dataclasses, complete at birth; YAML holds data, never Python names."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Literal

from jaxtune.config_checks import check_range, check_types, parse_bytes
from jaxtune.config_data import DataConfig
from jaxtune.errors import UserError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how its frozen weights are held.

    name_or_path: hub id, local directory, `.gguf` file, or `package:PACKAGE/FILE` inside an installed package.
    revision: branch, tag or commit of a hub id.
    sha256: expected digest of a single-file model; checked before it is read.
    local_files_only: never ask the hub; use what its cache holds.
    load_in_4bit: hold the linears' weights as NF4; otherwise in `dtype`.
    head: how the output head is held: in `dtype`, or in 8 or 4 bits, which takes less memory and leaves logits a little
        off (about 1 and 9 % of a weight); not for models whose head is the embedding table.
    double_quant: 8-bit scales (bitsandbytes' bnb_4bit_use_double_quant).
    dtype: compute dtype. auto is bf16 where the hardware has it, fp16 with loss scaling on older GPUs, fp32 on a CPU.
    embedding_on_host: hold the embedding table in host memory, of which the device gets the rows that it needs; not for
        models whose head is the same matrix.
    """

    name_or_path: str
    revision: str | None = None
    sha256: str | None = None
    local_files_only: bool = False
    load_in_4bit: bool = True
    head: Literal["dtype", "int8", "nf4"] = "dtype"
    double_quant: bool = True
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    embedding_on_host: bool = False

    def __post_init__(self) -> None:
        check_types("model", self)
        packaged = self.name_or_path.startswith("package:")
        if packaged and not re.fullmatch(r"package:\w+/.+", self.name_or_path):
            raise UserError(
                f"model.name_or_path is {self.name_or_path!r}; after package: it must name an importable package and a "
                "file in it, as in package:some_package/model.gguf"
            )
        if self.sha256 is not None:
            if not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
                raise UserError(
                    f"model.sha256 is {self.sha256!r}; it must be 64 hexadecimal digits, as sha256sum prints them"
                )
            object.__setattr__(self, "sha256", self.sha256.lower())
            if not packaged and not self.name_or_path.endswith(".gguf"):
                raise UserError(
                    f"model.sha256 is set, but model.name_or_path {self.name_or_path!r} is no single file; remove "
                    "model.sha256 (model.revision pins a hub model)"
                )
        if self.revision is not None and (packaged or self.name_or_path.endswith(".gguf")):
            raise UserError(
                f"model.revision is {self.revision!r}, but model.name_or_path {self.name_or_path!r} is a file; remove "
                "model.revision (model.sha256 pins a file)"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapter (LoRA, arXiv:2106.09685), with PEFT's names.

    r: rank. lora_alpha: scale numerator: the update is lora_alpha / r (or / sqrt(r) with use_rslora) times B A.
    lora_dropout: probability, on the adapter's input. target_modules: any subset of the seven linears.
    use_rslora: divide by the root of r instead of r (arXiv:2312.03732).
    dtype: dtype that A and B are stored and updated in. seed: of A's initial values; B starts at zero.
    start_from: directory of a PEFT adapter to train further, of which the settings above must be; None for a new one.
    """

    r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = LINEARS
    use_rslora: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = 3407
    start_from: str | None = None

    def __post_init__(self) -> None:
        check_types("lora", self)
        check_range("lora", self, "r", lambda x: x >= 1, "1 or more")
        check_range("lora", self, "lora_alpha", lambda x: x > 0, "more than 0 (twice lora.r is common)")
        check_range("lora", self, "lora_dropout", lambda x: 0 <= x < 1, "at least 0 (no dropout) and below 1")
        check_range("lora", self, "seed", lambda x: 0 <= x < 2**32, "at least 0 and below 2**32")
        names = self.target_modules
        if not names:
            raise UserError(f"lora.target_modules is empty; name at least one of {', '.join(LINEARS)}")
        for name in names:
            if name not in LINEARS:
                raise UserError(f"lora.target_modules has {name!r}; its members must be among {', '.join(LINEARS)}")
            if names.count(name) > 1:
                raise UserError(f"lora.target_modules has {name} {names.count(name)} times; name each linear once")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The step and the loop.

    batch_size: rows per micro-batch, over all devices. gradient_accumulation_steps: micro-batches per update.
    max_steps: updates; where None, num_train_epochs counts. num_train_epochs: passes over the data, of which one may be
        a part. seed: of data order and dropout.
    learning_rate: peak. lr_scheduler_type: constant, linear or cosine (to zero) after warmup_steps.
    warmup_steps: updates in which the rate rises from zero to its peak.
    optim: adamw (fp32 state), adamw_8bit (bitsandbytes' block-wise 8-bit state), or paged_adamw_8bit (the same in host
        memory between updates).
    weight_decay: decoupled, of every adapter matrix. adam_beta1, adam_beta2: decay of the moments.
    adam_epsilon: added to the root of the second moment.
    max_grad_norm: global-norm clipping; None for no clipping.
    remat: what the backward pass recomputes, from fast to lean: none, selective (the products of gate and up), full
        (all of a layer), offload (full, layer inputs in host memory), lean (offload, MLPs in slices); or
        auto, the fastest that fits memory_limit or the device.
    compute: what the frozen linears' products are rounded to in training: dtype (model.dtype); fp8, e4m3 with a scale a
        row, forward and backward; or fp8_backward, the gradients alone. For GPUs of compute capability 8.9 and newer
        (docs/fp8.md).
    fp8_exclude: linears that fp8 leaves in model.dtype, such as [down_proj]. fp8_exclude_layers: layers whose linears
        it leaves so, by index; negative ones from the end.
    deterministic: have a GPU, too, compute the same bits from the same seed each time. Without it cuDNN's attention,
        which rows of one document take, may add up gradients in another order each time. A CPU and packed rows repeat
        anyway.
    loss_chunk: tokens per chunk of the head and loss; None chooses from the vocabulary.
    logging_steps: updates between printed lines, where there is no terminal; metrics.jsonl has every update.
    eval_steps: updates between held-out losses (also measured before and after); None for those two only.
    eval_answers: documents of each held-out set whose last response is answered greedily as often, and compared with
        what stands there (ROUGE-L and exact match, in percent; `pip install "jaxtune[rouge]"`); None for no answers.
    eval_answer_tokens: new tokens for each, at most.
    on_nonfinite: what becomes of an update whose loss or gradient is not finite, which is never applied: stop ends the
        run there, skip goes on with the next batch, and stops after 10 in a row. Both say in which layer it began, and
        keep the batch for `python -m jaxtune.replay`.
    memory_limit: what the run may take of its GPU in all, as in 12GiB or 900MiB; None for the whole card. Memory is
        taken as it is needed, not at once.
    """

    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw_8bit"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    remat: Literal["auto", "none", "selective", "full", "offload", "lean"] = "auto"
    compute: Literal["dtype", "fp8", "fp8_backward"] = "dtype"
    fp8_exclude: tuple[str, ...] = ()
    fp8_exclude_layers: tuple[int, ...] = ()
    deterministic: bool = False
    loss_chunk: int | None = None
    seed: int = 3407
    logging_steps: int = 1
    eval_steps: int | None = None
    eval_answers: int | None = None
    eval_answer_tokens: int = 128
    on_nonfinite: Literal["stop", "skip"] = "stop"
    memory_limit: str | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows that one update takes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def is_paged(self) -> bool:
        """Whether the optimizer's state is in host memory between updates."""
        return self.optim.startswith("paged_")

    def __post_init__(self) -> None:
        check_types("train", self)
        if self.memory_limit is not None:
            parse_bytes("train.memory_limit", self.memory_limit)
        counts = "batch_size gradient_accumulation_steps max_steps loss_chunk logging_steps eval_steps eval_answers"
        check_range("train", self, f"{counts} eval_answer_tokens", lambda x: x >= 1, "1 or more")
        check_range("train", self, "num_train_epochs learning_rate adam_epsilon", lambda x: x > 0, "more than 0")
        check_range("train", self, "max_grad_norm", lambda x: x > 0, "more than 0, or to null for no clipping")
        check_range("train", self, "warmup_steps weight_decay", lambda x: x >= 0, "0 or more")
        for name in self.fp8_exclude:
            if name not in LINEARS:
                raise UserError(f"train.fp8_exclude has {name!r}; its members must be among {', '.join(LINEARS)}")
        check_range("train", self, "adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "at least 0 and below 1")
        check_range("train", self, "seed", lambda x: 0 <= x < 2**32, "at least 0 and below 2**32")


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where a run leaves its files: metrics.jsonl, checkpoints/, adapter/, samples.

    dir: output directory; must not hold another run unless resume is asked for.
    save_steps: updates between checkpoints; None for one at the end. save_total_limit: the newest ones that are kept.
    keep_best: so many more are kept, those with the lowest held-out loss, and the best is written as `adapter-best`.
    sample_prompts: user messages answered before and after training. sample_tokens: new tokens for each.
    report_to: services that are given the metrics, too: tensorboard, wandb, trackio (`pip install "jaxtune[wandb]"`).
    compile_cache: directory of compiled programs, shared by runs; None for no cache.
    """

    dir: str
    save_steps: int | None = None
    save_total_limit: int = 2
    keep_best: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    compile_cache: str | None = "~/.cache/jaxtune/compiled"

    def __post_init__(self) -> None:
        check_types("output", self)
        check_range("output", self, "save_steps save_total_limit sample_tokens", lambda x: x >= 1, "1 or more")
        check_range("output", self, "keep_best", lambda x: x >= 0, "0 (none) or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; the product is the number of devices used (docs/scale.md).

    data: rows of a batch are spread along it. fsdp: rows as well, and each device keeps a part of the weights, the
        adapters and the optimizer's state. tensor: attention heads, MLP columns and the vocabulary are spread along it;
        for devices that are linked closely. sequence: the tokens of each row.
    auto: all devices that there are, along data as long as the run fits, else along fsdp as well: with the fewest that
        it fits with. `mesh: auto` means the same.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    auto: bool = False

    @property
    def axes(self) -> dict[str, int]:
        """Devices along each axis, by its name."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence}

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
        return self.data * self.fsdp * self.tensor * self.sequence

    def __post_init__(self) -> None:
        check_types("mesh", self)
        check_range("mesh", self, "data fsdp tensor sequence", lambda x: x >= 1, "1 or more devices")
        if self.auto and self.devices > 1:
            raise UserError("mesh.auto is true, and axes of the mesh are set as well; remove them, or set it to false")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, as a YAML file states it: one section per field."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        for name, section in typing.get_type_hints(RunConfig).items():
            if not isinstance(getattr(self, name), section):
                raise UserError(
                    f"{name} is {getattr(self, name)!r}; it must be a section, given as a {section.__name__}"
                )
        _check_spread(self)
        train, devices = self.train, self.mesh.data * self.mesh.fsdp
        if train.batch_size % devices:
            raise UserError(
                f"train.batch_size is {train.batch_size}, which mesh.data * mesh.fsdp = {devices} does not divide; set "
                f"train.batch_size to a multiple of {devices}, or change the mesh"
            )
        if train.max_steps is not None and train.warmup_steps >= train.max_steps:
            raise UserError(
                f"train.warmup_steps is {train.warmup_steps}, but train.max_steps is {train.max_steps}: the learning "
                "rate would never reach its peak; set train.warmup_steps below train.max_steps"
            )
        save, measure = self.output.save_steps, train.eval_steps
        if self.output.keep_best and (save is None or measure is None or save % measure):
            raise UserError(
                f"output.keep_best is {self.output.keep_best}, but output.save_steps is {save} and train.eval_steps is "
                f"{measure}; set both, output.save_steps to a multiple of train.eval_steps, so that each is measured"
            )
        for key, value in (("eval_steps", train.eval_steps), ("eval_answers", train.eval_answers)):
            if value is not None and not self.data.has_eval:
                raise UserError(
                    f"train.{key} is {value}, but data.eval names no held-out data; set data.eval, or remove "
                    f"train.{key}"
                )


def _check_spread(config: RunConfig) -> None:
    """Raise UserError for what is not offered on several devices, or not where the weights are spread."""
    mesh, train = config.mesh, config.train
    if mesh.devices > 1 and train.is_paged:
        raise UserError(
            f"train.optim is {train.optim} on a mesh of {mesh.devices} devices, where its state is not paged; set "
            "train.optim to adamw_8bit, whose state mesh.fsdp spreads"
        )
    if mesh.devices > 1 and config.model.embedding_on_host:
        raise UserError(
            f"model.embedding_on_host is set on a mesh of {mesh.devices} devices, where it is not offered; remove it: "
            "mesh.fsdp and mesh.tensor spread the embedding table"
        )
    if mesh.devices > 1 and config.model.head != "dtype":
        raise UserError(
            f"model.head is {config.model.head} on a mesh of {mesh.devices} devices, where that is not offered; remove "
            "it: mesh.fsdp and mesh.tensor spread the head"
        )
    for key, value in (
        ("output.sample_prompts", config.output.sample_prompts),
        ("train.eval_answers", train.eval_answers),
    ):
        if value and (mesh.fsdp > 1 or mesh.tensor > 1):
            raise UserError(
                f"{key} is set, but answers are not generated where mesh.fsdp or mesh.tensor spreads the weights; "
                f"remove {key}, and ask the adapter after the run (python -m jaxtune.generate)"
            )
