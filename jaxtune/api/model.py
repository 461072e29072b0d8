"""A model on the device: talk with it, save it. Names and arguments are those of transformers, PEFT and Unsloth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.api.foreign import Foreign, ignored, refused, settle
from jaxtune.base import BaseModel
from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.decoding import Generator
from jaxtune.errors import UserError, shown
from jaxtune.export import save_peft_adapter
from jaxtune.export.live import export_live
from jaxtune.generate import model_stop_ids
from jaxtune.linear import Adaptation
from jaxtune.loading import read_hf_config, tensors_of
from jaxtune.lora import adaptation, count_parameters, init_lora
from jaxtune.samples import end_of_text
from jaxtune.sampling import Sampling

GENERATE: dict[str, Foreign] = {
    "num_beams": refused("one continuation is made for each prompt", 1),
    "num_return_sequences": refused("repeat the prompt instead", 1),
    "generation_config": refused("give the settings as arguments"),
    "logits_processor": refused("the filters are those of the arguments", []),
    "stopping_criteria": refused("use eos_token_id or stop_strings", []),
    "no_repeat_ngram_size": refused("use repetition_penalty", 0),
    "length_penalty": refused("it belongs to beam search", 1.0),
    "min_new_tokens": refused("an answer ends where the model ends it", 0),
    "return_dict_in_generate": refused("the token ids are returned", False),
    "output_scores": refused("the token ids are returned", False),
    "use_cache": ignored("keys and values are always kept", True),
    "pad_token_id": ignored("rows that end early are filled up with the tokenizer's padding token"),
    "cache_implementation": ignored("the cache has a fixed size"),
    "tokenizer": ignored("the model's own is used"),
    "synced_gpus": ignored("a model is on one device", False),
    "token_type_ids": ignored("causal models have no token types"),
}


@dataclasses.dataclass(eq=False)
class Model:
    """A base model on the device, with an adapter or without.

    config: what was loaded. base: its files, tokenizer and sizes. frozen: its weights. max_seq_length: tokens of a row
    in training. lora_config: the adapter's settings, None for none. lora: its tree; None where it is new and untouched.
    remat: what the backward pass recomputes. memory_limit: as `train.memory_limit`.
    """

    config: ModelConfig
    base: BaseModel
    frozen: Any
    max_seq_length: int
    lora_config: LoraConfig | None = None
    lora: Any = None
    remat: str = "full"
    memory_limit: str | None = None

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
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        seed: int = 0,
        streamer: Any = None,
        **others: Any,
    ) -> np.ndarray:
        """Continue token ids, as transformers' `generate` does.

        Args:
            input_ids: [B, P], or [P] for one prompt: lists, NumPy, JAX or (on the CPU) torch; or a tokenizer's whole
                result.
            attention_mask: 1 for tokens, 0 for padding, in front or behind; None for no padding.
            max_new_tokens: at most this many; max_length says the same with the prompt's counted in. None for both
                is 256 new ones. do_sample: None draws if any of temperature, top_k, top_p and min_p is
                given, and else takes the most likely token. repetition_penalty, seed: see jaxtune.sampling.
            eos_token_id: tokens that end a row; None for those that the tokenizer and the model's files name.
            stop_strings: a row ends with the token that completes one of these in what was made.
            streamer: transformers' TextStreamer, or anything with put(ids) and end(); for one prompt.

        Returns:
            int64 [B, P + new]: the input, then what was made, with the token that ended a row, then padding.

        Raises:
            UserError: arguments that do not fit together, or that have no counterpart.
        """
        settle("generate", others, GENERATE, ("input_ids", "max_new_tokens", "temperature", "stop_strings", "seed"))
        if isinstance(input_ids, Mapping):
            attention_mask = input_ids.get("attention_mask", attention_mask)
            input_ids = input_ids.get("input_ids")
        ids = _to_numpy("input_ids", input_ids)
        mask = np.ones_like(ids) if attention_mask is None else _to_numpy("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise UserError(f"generate: attention_mask has shape {mask.shape}, input_ids {ids.shape}; make them alike")
        if streamer is not None and len(ids) > 1:
            raise UserError(
                f"generate: a streamer shows one prompt, input_ids has {len(ids)}; give one, or no streamer"
            )
        if max_new_tokens is None:
            max_new_tokens = 256 if max_length is None else max_length - ids.shape[1]
        elif max_length is not None:
            raise UserError("generate: max_new_tokens and max_length both say how much; keep one of them")
        if max_new_tokens < 1:
            raise UserError(f"generate: there is room for {max_new_tokens} new tokens; raise max_new_tokens")
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
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if not all(isinstance(string, str) and string for string in strings):
            raise UserError(f"generate: stop_strings is {shown(stop_strings)}; give texts that are not empty")
        prompts = [row[kept != 0].tolist() for row, kept in zip(ids, mask)]
        rows: list[list[int]] = [[] for _ in prompts]
        if streamer is not None:
            streamer.put(ids)
        pieces = self.generator().stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stops, keep_stop=True
        )
        ended = [False] * len(rows)
        for news in pieces:
            for at, (row, new) in enumerate(zip(rows, news)):
                if ended[at]:
                    continue
                known = len(row)
                row += new
                end = end_of_text(tokenizer, row, strings, known)
                row[:] = row[:end]
                ended[at] = end is not None or (len(row) > 0 and row[-1] in stops)
                if streamer is not None:
                    for token in row[known:]:
                        streamer.put(np.array([token]))
            if all(ended):
                break
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
        trained = count_parameters(shapes)
        total = trained + sum(math.prod(slot.shape) for slot in tensors_of(read_hf_config(self.base.source)))
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

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
        try:
            save_peft_adapter(
                save_directory,
                lora,
                config,
                self.base.source,
                decoder=self.base.decoder,
                modules=self.base.modules,
                tokenizer=tokenizer,
                overwrite=overwrite,
            )
        except OSError as error:
            raise UserError(
                f"save_pretrained: {save_directory} cannot be written ({error.strerror}); name another directory"
            ) from error

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        *,
        overwrite: bool = False,
        **others: Any,
    ) -> None:
        """Write the weights with the adapter added to them, for transformers and vLLM, and the tokenizer.

        The adapter is added to the weights as it was trained with them, 4-bit rounding included: what is written
        answers as this model does. `python -m jaxtune.export` also reads it back and compares logits.

        save_method: merged_16bit (bfloat16), merged_4bit (bitsandbytes NF4, rounded anew), or lora (the adapter alone).

        Raises:
            UserError: something is at save_directory and `overwrite` is false, or an unknown method.
        """
        settle("save_pretrained_merged", others, SAVE, ("save_directory", "tokenizer", "save_method", "overwrite"))
        if save_method == "lora":
            self.save_pretrained(save_directory, tokenizer, overwrite=overwrite)
            return
        if save_method not in MERGED:
            raise UserError(
                f"save_pretrained_merged: save_method={shown(save_method)}; it must be lora or one of "
                f"{', '.join(MERGED)}"
            )
        self._export(save_directory, MERGED[save_method], tokenizer, overwrite=overwrite)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "q8_0",
        *,
        overwrite: bool = False,
        **others: Any,
    ) -> None:
        """Write GGUF files for llama.cpp with the adapter added to the weights, and a Modelfile for Ollama.

        quantization_method: f32, f16, bf16, q8_0, q4_0, q5_0, q4_k_m, q5_k_m or q6_k; one or several.

        Raises:
            UserError: something is at save_directory and `overwrite` is false, or an unknown method.
        """
        known = ("save_directory", "tokenizer", "quantization_method", "overwrite")
        settle("save_pretrained_gguf", others, SAVE, known)
        methods = [quantization_method] if isinstance(quantization_method, str) else quantization_method
        types = [GGUF_METHODS.get(method, method.upper()) for method in methods]
        self._export(save_directory, "gguf", tokenizer, file_types=types, overwrite=overwrite)

    def _export(self, directory: str | Path, target: str, tokenizer: Any, **settings: Any) -> None:
        tokenizer = self.base.tokenizer if tokenizer is None else tokenizer
        export_live(
            directory,
            target,
            self.base.source,
            self.frozen,
            self.lora or {},
            self.lora_config,
            tokenizer,
            modules=self.base.modules,
            hf_config=self.base.hf_config,
            vocabulary=None if self.base.own_tokenizer is None else tokenizer,
            **settings,
        )

    def _adapter_config(self) -> LoraConfig:
        if self.lora_config is None:
            raise UserError("the model has no adapter; make one with FastLanguageModel.get_peft_model")
        return self.lora_config


# Unsloth's names.
MERGED = {"merged_16bit": "merged", "merged_4bit": "merged-4bit", "merged_4bit_forced": "merged-4bit"}
GGUF_METHODS = {"not_quantized": "BF16", "fast_quantized": "Q8_0", "quantized": "Q4_K_M"}
SAVE: dict[str, Foreign] = {
    "safe_serialization": refused("safetensors are written", True),
    "save_adapter": ignored("the adapter is what is saved", True),
    "push_to_hub": refused("upload the directory with `hf upload`", False),
    "token": refused("nothing is uploaded", ""),
    "first_conversion": ignored("weights are converted once"),
    "temporary_location": ignored("what is written has its name only when it is whole"),
    "maximum_memory_usage": ignored("one tensor at a time is held"),
}


def _to_numpy(name: str, values: Any) -> np.ndarray:
    """Token ids or a mask as int64 [B, P]."""
    if values is None:
        raise UserError(f"generate: {name} is missing; write model.generate(**tokenizer([prompt]))")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"generate: {name} is no array on the host ({error}); pad prompts to one length (padding=True), and leave "
            "out .to('cuda')"
        ) from error
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "iub":
        raise UserError(f"generate: {name} must be whole numbers [B, P], not {array.dtype} {array.shape}")
    return np.atleast_2d(array).astype(np.int64)
