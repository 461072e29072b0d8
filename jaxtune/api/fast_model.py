"""FastLanguageModel: load a model and put an adapter on it. Names and arguments are those of Unsloth and PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jaxtune.api.foreign import Foreign, ignored, refused, settle
from jaxtune.api.model import Model
from jaxtune.api.tokenizer import on_host
from jaxtune.base import find_base
from jaxtune.config import LINEARS, LoraConfig, ModelConfig, TrainConfig
from jaxtune.config_checks import parse_bytes
from jaxtune.device_memory import check_limit, limit_memory
from jaxtune.errors import UserError, shown
from jaxtune.export.modules import adapted_base
from jaxtune.generate import base_of, load_adapter
from jaxtune.loading import resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES: dict[str, Literal["bf16", "fp16", "fp32"]] = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp16": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "fp32": "fp32",
}
_PLACEMENT = "the model is on JAX's first device; choose it with CUDA_VISIBLE_DEVICES before the start"
FROM_PRETRAINED: dict[str, Foreign] = {
    "load_in_8bit": refused("weights are held as NF4 or in the compute dtype; use load_in_4bit", False),
    "load_in_16bit": refused("set load_in_4bit=False for weights in the compute dtype", False),
    "full_finetuning": refused("an adapter is trained, the weights stay as they are", False),
    "token": refused("log in once with `hf auth login`; the token is then found by itself"),
    "cache_dir": refused("the hub's cache is where HF_HOME says"),
    "rope_scaling": refused("the model's own rope scaling holds"),
    "quantization_config": refused("use load_in_4bit (NF4 with double quantisation)"),
    "resize_model_vocab": refused("the vocabulary stays as it is"),
    "trust_remote_code": ignored("no code of a checkpoint is ever run", False),
    "device_map": ignored(_PLACEMENT, "auto", "sequential", "cuda"),
    "attn_implementation": ignored("python -m jaxtune shows which attention runs, and why"),
    "use_gradient_checkpointing": ignored("it is set with get_peft_model", "unsloth", True, False),
    "fast_inference": ignored("generation runs in this process, without vLLM", False),
    "gpu_memory_utilization": ignored("memory is taken as it is needed"),
    "max_lora_rank": ignored("any rank serves"),
    "random_state": ignored("loading draws no random numbers; get_peft_model takes the seed"),
    "fix_tokenizer": ignored("the tokenizer is used as the model has it", True, False),
    "disable_log_stats": ignored("nothing is logged"),
    "use_exact_model_name": ignored("the name is always taken as it is", True, False),
    "unsloth_force_compile": ignored("the step is always compiled", False),
}
GET_PEFT_MODEL: dict[str, Foreign] = {
    "bias": refused("biases are frozen", "none"),
    "loftq_config": refused("adapters start as PEFT's default does", {}),
    "init_lora_weights": refused("A starts uniform and B at zero, as PEFT's default does", True),
    "modules_to_save": refused("only the seven linears are adapted", []),
    "layers_to_transform": refused("all layers are adapted", []),
    "layers_pattern": refused("all layers are adapted"),
    "use_dora": refused("only LoRA is trained", False),
    "target_parameters": refused("name linears in target_modules"),
    "qat_scheme": refused("training is not quantisation-aware"),
    "task_type": ignored("models are causal language models", "CAUSAL_LM"),
    "max_seq_length": ignored("the length was set with from_pretrained; SFTConfig(max_length=...) changes it"),
    "temporary_location": ignored("nothing is written"),
    "ensure_weight_tying": ignored("tied embeddings are one tensor", False),
}


class FastLanguageModel:
    """Unsloth's entry point: `from_pretrained`, `get_peft_model`, `for_inference`."""

    @staticmethod
    def from_pretrained(
        model_name: str | None = None,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        *,
        head: Literal["dtype", "int8", "nf4"] = "dtype",
        embedding_on_host: bool = False,
        model_name_or_path: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        memory_limit: str | None = None,
        **others: Any,
    ) -> tuple[Model, PreTrainedTokenizerFast]:
        """Load a model onto the device, quantised on the way, and its tokenizer.

        Args:
            model_name, model_name_or_path: hub id, directory, `.gguf` file, `package:PACKAGE/FILE`, or the directory
                of a PEFT adapter, whose base model is then loaded with the adapter on it.
            max_seq_length: tokens of a row in training, where the trainer does not say otherwise.
            dtype: None for what the device is good at; or bfloat16, float16, float32, by name or as torch's or JAX's.
            load_in_4bit: hold the linears as NF4 with double quantisation. head: how the output head is held.
            embedding_on_host: hold the embedding table in host memory, of which the device reads the rows it needs.
            revision: branch, tag or commit of a hub id. local_files_only: never ask the hub.
            memory_limit: what this process may take of its GPU in all, as in "12GiB"; None for the whole card. Memory
                is taken as it is needed. To be said before anything else in the process uses JAX.

        Raises:
            UserError: no such model, an argument that would have to change results, or a limit that comes too late.
        """
        known = ("model_name", "max_seq_length", "dtype", "load_in_4bit", "head", "embedding_on_host", "revision")
        settle("from_pretrained", others, FROM_PRETRAINED, (*known, "local_files_only", "memory_limit"))
        if not isinstance(max_seq_length, int) or max_seq_length < 1:
            raise UserError(
                f"from_pretrained: max_seq_length={shown(max_seq_length)}; it must be a whole number above 0"
            )
        if memory_limit is not None:
            parse_bytes("memory_limit", memory_limit)
        if (model_name is None) == (model_name_or_path is None):
            raise UserError("from_pretrained: name the model once, with model_name or with model_name_or_path")
        name = str(model_name_or_path if model_name is None else model_name)
        adapter = Path(name).expanduser()
        is_adapter = (adapter / "adapter_config.json").is_file() and not (adapter / "config.json").is_file()
        config = ModelConfig(
            base_of(adapter) if is_adapter else name,
            revision=revision,
            local_files_only=local_files_only,
            load_in_4bit=load_in_4bit,
            head=head,
            embedding_on_host=embedding_on_host,
            dtype="auto" if dtype is None else _dtype_name(dtype),
        )
        limit_memory(memory_limit)
        check_limit(memory_limit)
        base = find_base(config)
        lora_config, lora, tokenizer = None, None, base.tokenizer
        if is_adapter:
            base = adapted_base(base, adapter)
            lora, lora_config, tokenizer = load_adapter(adapter, base)
            lora = jax.device_put(lora)
        given = on_host(tokenizer)
        own = None if tokenizer is base.tokenizer else given
        base = dataclasses.replace(base, tokenizer=given, own_tokenizer=own)
        model = Model(config, base, base.load(), max_seq_length, lora_config, lora, memory_limit=memory_limit)
        return model, base.tokenizer

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Sequence[str] | str = LINEARS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        *,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        **others: Any,
    ) -> Model:
        """The model with a new adapter on its linears; the weights are shared with `model`.

        Args:
            target_modules: any of the seven linears, or "all-linear".
            use_gradient_checkpointing: False keeps every activation for the backward pass (`train.remat: none`), True
                only each layer's input (`full`), "unsloth" the same in host memory (`offload`; on a CPU, `full`),
                "auto" is the fastest policy that fits. Any other of `train.remat` may be named too.
            random_state: seed of the adapter's initial values. The rest as in PEFT.

        Raises:
            UserError: the model has an adapter already, values out of range, or an unsupported argument.
        """
        known = ("r", "target_modules", "lora_alpha", "lora_dropout", "use_gradient_checkpointing", "random_state")
        settle("get_peft_model", others, GET_PEFT_MODEL, (*known, "use_rslora"))
        if model.lora_config is not None:
            raise UserError("get_peft_model: the model has an adapter already; load the base model for another one")
        names = LINEARS if target_modules == "all-linear" else target_modules
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=(names,) if isinstance(names, str) else tuple(names),
            use_rslora=use_rslora,
            seed=random_state,
        )
        return dataclasses.replace(model, lora_config=config, remat=_remat(use_gradient_checkpointing))

    @staticmethod
    def for_inference(model: Model) -> Model:
        """The model itself: it can generate at any time."""
        return model

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str | None = None) -> Model:
        """The model itself, with another policy of what the backward pass recomputes if one is given."""
        if use_gradient_checkpointing is not None:
            model.remat = _remat(use_gradient_checkpointing)
        return model


def is_bfloat16_supported() -> bool:
    """Whether `dtype=None` computes in bfloat16 on this machine: on GPUs since Ampere."""
    return bool(resolve_dtype() == jnp.bfloat16)


def _remat(policy: bool | str) -> str:
    if isinstance(policy, bool):
        return "full" if policy else "none"
    if policy == "unsloth":
        return "offload" if jax.default_backend() == "gpu" else "full"
    return TrainConfig(remat=policy).remat  # type: ignore[arg-type]  # checked there


def _dtype_name(dtype: Any) -> Literal["bf16", "fp16", "fp32"]:
    """The name of a dtype given by name, or as torch's, NumPy's or JAX's."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    short = name.rpartition(".")[2]
    if short not in DTYPES:
        raise UserError(f"from_pretrained: dtype is {shown(dtype)}; it must be None, bfloat16, float16 or float32")
    return DTYPES[short]
