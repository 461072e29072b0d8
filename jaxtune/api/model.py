"""FastLanguageModel: load a model, put an adapter on it, talk with it, save it. Names and arguments are those of
Unsloth, PEFT and transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.api.foreign import Foreign, ignored, refused, settle
from jaxtune.base import BaseModel, find_base
from jaxtune.config import LINEARS, LoraConfig, ModelConfig, TrainConfig
from jaxtune.decoding import Generator
from jaxtune.errors import UserError, shown
from jaxtune.export import save_peft_adapter
from jaxtune.generate import base_of, load_adapter, model_stop_ids
from jaxtune.linear import Adaptation
from jaxtune.loading import resolve_dtype
from jaxtune.lora import adaptation, count_parameters, init_lora
from jaxtune.sampling import Sampling

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
GENERATE: dict[str, Foreign] = {
    "num_beams": refused("one continuation is made for each prompt", 1),
    "num_return_sequences": refused("repeat the prompt instead", 1),
    "generation_config": refused("give the settings as arguments"),
    "logits_processor": refused("the filters are those of the arguments", []),
    "stopping_criteria": refused("use eos_token_id, or `python -m jaxtune.generate --stop`", []),
    "no_repeat_ngram_size": refused("use repetition_penalty", 0),
    "length_penalty": refused("it belongs to beam search", 1.0),
    "min_new_tokens": refused("an answer ends where the model ends it", 0),
    "return_dict_in_generate": refused("the token ids are returned", False),
    "output_scores": refused("the token ids are returned", False),
    "use_cache": ignored("keys and values are always kept", True),
    "pad_token_id": ignored("rows that end early are filled up with the tokenizer's padding token"),
    "cache_implementation": ignored("the cache has a fixed size"),
    "token_type_ids": ignored("causal models have no token types"),
}


@dataclasses.dataclass(eq=False)
class Model:
    """A base model on the device, with an adapter or without.

    config: what was loaded. base: its files, tokenizer and sizes. frozen: its weights. max_seq_length: tokens of a row
    in training. lora_config: the adapter's settings, None for none. lora: its tree; None where it is new and untouched.
    remat: what the backward pass recomputes.
    """

    config: ModelConfig
    base: BaseModel
    frozen: Any
    max_seq_length: int
    lora_config: LoraConfig | None = None
    lora: Any = None
    remat: str = "full"

    def generator(self) -> Generator:
        """The model as it is now, for token ids in batches, streamed or whole."""
        acts = Adaptation() if self.lora_config is None else adaptation(self.lora_config)
        # A new adapter changes nothing, as its B is zero.
        return Generator(self.frozen, self.lora or {}, self.base.decoder, acts, self.base.dtype)

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 256,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        streamer: Any = None,
        **others: Any,
    ) -> np.ndarray:
        """Continue token ids, as transformers' `generate` does.

        Args:
            input_ids: [B, P], or [P] for one prompt: lists, NumPy, JAX or (on the CPU) torch.
            attention_mask: 1 for tokens, 0 for padding, in front or behind; None for no padding.
            max_new_tokens: at most this many. do_sample: None draws if any of temperature, top_k, top_p and min_p is
                given, and else takes the most likely token. repetition_penalty, seed: see jaxtune.sampling.
            eos_token_id: tokens that end a row; None for those that the tokenizer and the model's files name.
            streamer: transformers' TextStreamer, or anything with put(ids) and end(); for one prompt.

        Returns:
            int64 [B, P + new]: the input, then what was made, with the token that ended a row, then padding.

        Raises:
            UserError: arguments that do not fit together, or that have no counterpart.
        """
        settle("generate", others, GENERATE, ("input_ids", "max_new_tokens", "temperature", "top_p", "seed"))
        ids = _to_numpy("input_ids", input_ids)
        mask = np.ones_like(ids) if attention_mask is None else _to_numpy("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise UserError(f"generate: attention_mask has shape {mask.shape}, input_ids {ids.shape}; make them alike")
        if streamer is not None and len(ids) > 1:
            raise UserError(
                f"generate: a streamer shows one prompt, input_ids has {len(ids)}; give one, or no streamer"
            )
        filters: Any = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        asked = {"temperature": temperature, **filters}
        given = [name for name, value in asked.items() if value is not None]
        if do_sample is False and given:
            raise UserError(f"generate: {', '.join(given)} given with do_sample=False; remove one of them")
        draws = bool(given) if do_sample is None else do_sample
        heat = (1.0 if temperature is None else temperature) if draws else 0.0
        sampling = Sampling(heat, **filters, repetition_penalty=repetition_penalty, seed=seed)
        tokenizer = self.base.tokenizer
        if eos_token_id is None:
            stops = model_stop_ids(tokenizer, self.base.source)
        else:
            stops = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        prompts = [row[kept != 0].tolist() for row, kept in zip(ids, mask)]
        rows: list[list[int]] = [[] for _ in prompts]
        if streamer is not None:
            streamer.put(ids)
        pieces = self.generator().stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stops, keep_stop=True
        )
        for news in pieces:
            for row, new in zip(rows, news):
                row += new
            if streamer is not None:
                for token in news[0]:
                    streamer.put(np.array([token]))
        if streamer is not None:
            streamer.end()
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        made = np.full((len(rows), max(map(len, rows))), fill, np.int64)
        for place, row in zip(made, rows):
            place[: len(row)] = row
        return np.concatenate([ids, made], axis=1)

    def print_trainable_parameters(self) -> None:
        """Say how many parameters are trained, as PEFT does."""
        config = self.lora_config
        shapes = {} if config is None else jax.eval_shape(lambda: init_lora(config, self.base.decoder))
        print(f"trainable params: {count_parameters(shapes):,}")

    def save_pretrained(
        self, save_directory: str | Path, tokenizer: Any = None, *, overwrite: bool = False, **others: Any
    ) -> None:
        """Write the adapter in PEFT's files, and the tokenizer beside it if one is given.

        Raises:
            UserError: there is no adapter, or one is in the directory already and `overwrite` is false.
        """
        settle("save_pretrained", others, SAVE, ("save_directory", "tokenizer", "overwrite"))
        config = self._adapter_config()
        lora = init_lora(config, self.base.decoder) if self.lora is None else self.lora
        save_peft_adapter(
            save_directory,
            lora,
            config,
            self.base.source,
            model_type=self.base.decoder.model_type,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )

    def _adapter_config(self) -> LoraConfig:
        if self.lora_config is None:
            raise UserError("the model has no adapter; make one with FastLanguageModel.get_peft_model")
        return self.lora_config


SAVE: dict[str, Foreign] = {
    "safe_serialization": refused("safetensors are written", True),
    "save_adapter": ignored("the adapter is what is saved", True),
    "push_to_hub": refused("upload the directory with `hf upload`", False),
    "maximum_memory_usage": ignored("one tensor at a time is held"),
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
        model_name_or_path: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> tuple[Model, PreTrainedTokenizerFast]:
        """Load a model onto the device, quantised on the way, and its tokenizer.

        Args:
            model_name, model_name_or_path: hub id, directory, `.gguf` file, `package:PACKAGE/FILE`, or the directory
                of a PEFT adapter, whose base model is then loaded with the adapter on it.
            max_seq_length: tokens of a row in training, where the trainer does not say otherwise.
            dtype: None for what the device is good at; or bfloat16, float16, float32, by name or as torch's or JAX's.
            load_in_4bit: hold the linears as NF4 with double quantisation. revision: branch, tag or commit.

        Raises:
            UserError: no such model, or an argument that would have to change results.
        """
        known = ("model_name", "max_seq_length", "dtype", "load_in_4bit", "revision", "local_files_only")
        settle("from_pretrained", others, FROM_PRETRAINED, known)
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
            dtype="auto" if dtype is None else _dtype_name(dtype),
        )
        base = find_base(config)
        lora_config = None
        lora = None
        if is_adapter:
            lora, lora_config, tokenizer = load_adapter(adapter, base)
            lora, base = jax.device_put(lora), dataclasses.replace(base, tokenizer=tokenizer)
        return Model(config, base, base.load(), max_seq_length, lora_config, lora), base.tokenizer

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
                only each layer's input (`full`), "unsloth" the same in host memory (`offload`; on a CPU, `full`). Any
                of jaxtune's own policies may be named too.
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


def _to_numpy(name: str, values: Any) -> np.ndarray:
    """Token ids or a mask as int64 [B, P]."""
    if isinstance(values, Mapping) or values is None:
        raise UserError(f"generate: {name} is {shown(values)}; write model.generate(**inputs) for a tokenizer's result")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"generate: {name} is no array on the host ({error}); leave out .to('cuda')") from error
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "iub":
        raise UserError(f"generate: {name} must be whole numbers [B, P], not {array.dtype} {array.shape}")
    return np.atleast_2d(array).astype(np.int64)
