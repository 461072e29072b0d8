"""The configuration of a run: frozen dataclasses, complete at birth; YAML holds data, never Python names."""

from __future__ import annotations

import dataclasses
from typing import Literal

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how its frozen weights are held.

    name_or_path: hub id, local directory, `.gguf` file, or `package:PACKAGE/FILE` inside an installed package.
    revision: branch, tag or commit of a hub id.
    sha256: expected digest of a single-file model; checked before it is read.
    local_files_only: never ask the hub; use what its cache holds.
    load_in_4bit: hold the linears' weights as NF4; otherwise in `dtype`.
    double_quant: 8-bit scales (bitsandbytes' bnb_4bit_use_double_quant).
    dtype: compute dtype. auto is bf16 where the hardware has it, fp16 with loss scaling on older GPUs, fp32 on a CPU.
    """

    name_or_path: str
    revision: str | None = None
    sha256: str | None = None
    local_files_only: bool = False
    load_in_4bit: bool = True
    double_quant: bool = True
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapter (LoRA, arXiv:2106.09685), with PEFT's names.

    r: rank. lora_alpha: scale numerator: the update is lora_alpha / r (or / sqrt(r) with use_rslora) times B A.
    lora_dropout: probability, on the adapter's input. target_modules: any subset of the seven linears.
    dtype: dtype that A and B are stored and updated in. seed: of A's initial values; B starts at zero.
    """

    r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = LINEARS
    use_rslora: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = 3407


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learnt, and how it is laid out in batches.

    train, eval: a JSON or JSONL file, anything else that `datasets` loads from disk (parquet, csv, text), or a hub id.
    train_split, eval_split: split name within it.
    form: instruction (instruction/input/output), messages (role/content) or text; auto looks at the columns.
    text_field: column of the text form.
    train_on: responses (the assistant's turns) or all tokens.
    max_length: tokens per row. packing: several documents in a row, which never attend to each other.
    overlong: what happens to a document longer than max_length: error, drop or truncate.
    shuffle: a new order in each epoch, from train.seed.
    """

    train: str
    eval: str | None = None
    train_split: str = "train"
    eval_split: str = "train"
    form: Literal["auto", "instruction", "messages", "text"] = "auto"
    text_field: str = "text"
    train_on: Literal["responses", "all"] = "responses"
    max_length: int = 2048
    packing: bool = True
    overlong: Literal["error", "drop", "truncate"] = "error"
    shuffle: bool = True


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The step and the loop.

    batch_size: rows per micro-batch, over all devices. gradient_accumulation_steps: micro-batches per update.
    max_steps: updates; where None, num_train_epochs counts. seed: of data order and dropout.
    learning_rate: peak. lr_scheduler_type: constant, linear or cosine (to zero) after warmup_steps of linear warmup.
    optim: adamw (fp32 state) or adamw_8bit (bitsandbytes' block-wise 8-bit state).
    max_grad_norm: global-norm clipping; None for no clipping.
    remat: what the backward pass recomputes: none, full (all of a layer), or offload (full, layer inputs in host memory).
    loss_chunk: tokens per chunk of the head and loss; None chooses from the vocabulary.
    eval_steps: updates between held-out losses (also measured before and after); None for those two only.
    """

    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    optim: Literal["adamw", "adamw_8bit"] = "adamw_8bit"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    remat: Literal["none", "full", "offload"] = "full"
    loss_chunk: int | None = None
    seed: int = 3407
    logging_steps: int = 1
    eval_steps: int | None = None


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where a run leaves its files: metrics.jsonl, checkpoints/, adapter/, samples.

    dir: output directory; must not hold another run unless resume is asked for.
    save_steps: updates between checkpoints; None for one at the end. save_total_limit: checkpoints kept.
    sample_prompts: user messages answered before and after training. sample_tokens: new tokens for each.
    compile_cache: directory of compiled programs, shared by runs; None for no cache.
    """

    dir: str
    save_steps: int | None = None
    save_total_limit: int = 2
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    compile_cache: str | None = "~/.cache/jaxtune/compiled"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; the product must be the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, as a YAML file states it: one section per field."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
