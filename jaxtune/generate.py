"""`python -m jaxtune.generate`: continue prompts with a model, straight from NF4 and an adapter, text as it is made."""

from __future__ import annotations

import sys

from jaxtune.answer_command import generate as main

if __name__ == "__main__":
    # Before the imports below, which take seconds: help and mistakes in the arguments are answered at once.
    sys.exit(main())

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxtune.base import BaseModel, find_base
from jaxtune.compile_cache import use_compile_cache
from jaxtune.config import LoraConfig, ModelConfig, OutputConfig
from jaxtune.decoding import Generator
from jaxtune.device_memory import check_limit, limit_memory
from jaxtune.devices import Device, this_device
from jaxtune.errors import UserError
from jaxtune.export import load_peft_adapter
from jaxtune.export.modules import adapted_base
from jaxtune.linear import Adaptation
from jaxtune.loading import Source, adapter_tokenizer, read_hf_config, resolve_source
from jaxtune.lora import GROUP_OF_LINEAR, adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.samples import TextGenerator, encode_chat, encode_text, stop_ids
from jaxtune.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_text_generator(config: ModelConfig, adapter: str | Path | None = None) -> TextGenerator:
    """Load a base model, with an adapter on it if one is named, ready to answer.

    The tokenizer is the adapter's own where one was saved beside it, else the base model's. Answers end with the
    tokenizer's end of sequence and with the tokens that the model's `config.json` and `generation_config.json` name.

    Raises:
        UserError: files that are missing or damaged, or an adapter of another model.
    """
    base = find_base(config)
    lora: dict[str, Any] = {}
    acts, tokenizer = Adaptation(), base.tokenizer
    if adapter is not None:
        base = adapted_base(base, adapter)
        lora, lora_config, tokenizer = load_adapter(adapter, base)
        acts = adaptation(lora_config)
    # In the dtype that products take: it is trained no more.
    on_device = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, base.dtype)), lora)
    generator = Generator(base.load(), on_device, base.decoder, acts, base.dtype)
    return TextGenerator(generator, tokenizer, model_stop_ids(tokenizer, base.source))


def load_adapter(adapter: str | Path, base: BaseModel) -> tuple[dict[str, Any], LoraConfig, PreTrainedTokenizerFast]:
    """An adapter's tree on the host, its settings, and the tokenizer saved beside it or else the base model's.

    The whole tensors that it may bring are in what `adapted_base` made of its base model.

    Raises:
        UserError: files that are missing or damaged, or an adapter of another model.
    """
    directory = Path(adapter).expanduser()
    lora, config = load_peft_adapter(directory, decoder=base.decoder, allow_modules=True)
    check_adapter(lora, base.decoder, directory)
    own = adapter_tokenizer(directory)
    return lora, config, base.tokenizer if own is None else own


def model_stop_ids(tokenizer: Any, source: Source) -> tuple[int, ...]:
    """Tokens that end an answer, as the tokenizer and the model's files name them."""
    configs = [read_hf_config(source)]
    generation_config = source.path / "generation_config.json"
    if not source.is_gguf and generation_config.is_file():
        try:
            configs.append(json.loads(generation_config.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{generation_config} is no valid JSON: {error}; take the model's own file") from error
    return stop_ids(tokenizer, *configs)


def check_adapter(lora: Mapping[str, Any], decoder: DecoderConfig, name: str | Path) -> None:
    """Raise UserError where an adapter's tensors do not fit a model's linears."""
    for linear, (n, k) in decoder.linear_shapes().items():
        leaves = lora["layers"].get(GROUP_OF_LINEAR[linear], {}).get(linear)
        if leaves is None:
            continue
        (*layers, _, width), (*_, out, _) = leaves["lora_A"].shape, leaves["lora_B"].shape
        if (layers, out, width) != ([decoder.num_layers], n, k):
            raise UserError(
                f"adapter {name}: {linear} was made for {layers[0]} layers of [{out}, {width}], the model has "
                f"{decoder.num_layers} of [{n}, {k}]; name the adapter's own base model"
            )


def read_sampling(options: argparse.Namespace) -> Sampling:
    """How to choose tokens; raises UserError for values out of range, and for filters that would have no effect."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}; set it to 1 or more")
    filters = {name: getattr(options, name) for name in ("top_k", "top_p", "min_p")}
    if options.temperature == 0 and (given := [name for name, value in filters.items() if value is not None]):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags} without --temperature: the most likely token is taken anyway; add --temperature 1")
    return Sampling(options.temperature, **filters, repetition_penalty=options.repetition_penalty, seed=options.seed)


def table_is_better_on_host(config: ModelConfig, device: Device) -> bool:
    """Whether this model's embedding table takes room on the device for nothing: of all its rows a token needs one,
    which a GPU reads from the host's memory itself."""
    tied = DecoderConfig.from_hf(read_hf_config(resolve_source(config))).tie_word_embeddings
    return not tied and not device.shared


def load_from_arguments(options: argparse.Namespace) -> TextGenerator:
    """The model that the arguments name, within the memory that they give it."""
    limit_memory(options.memory_limit)
    check_limit(options.memory_limit)
    name = options.model or base_of(options.adapter)
    config = ModelConfig(
        name,
        revision=options.revision,
        local_files_only=options.local_files_only,
        load_in_4bit=not options.no_4bit,
        head=options.head,
        embedding_on_host=bool(options.embedding_on_host),
        dtype=options.dtype,
    )
    if options.embedding_on_host is None:
        config = dataclasses.replace(config, embedding_on_host=table_is_better_on_host(config, this_device()))
    cache = OutputConfig("-").compile_cache
    assert cache is not None
    use_compile_cache(cache)
    started = time.perf_counter()
    text = load_text_generator(config, options.adapter)
    print(f"loaded {name} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return text


def base_of(adapter: Path) -> str:
    """The base model that an adapter's configuration names; raises UserError where there is none."""
    path = adapter.expanduser() / "adapter_config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not name its base model ({error}); name it with --model") from error
    return str(name)


def encode(text: TextGenerator, prompt: str, system: str | None, *, raw: bool) -> list[int]:
    """Token ids of one prompt: through the chat template, or as it stands with `raw` or where there is no template.

    Raises:
        UserError: a system message that nothing can carry, or a template that refuses.
    """
    if raw or not text.tokenizer.chat_template:
        if system is not None:
            raise UserError("--system needs a chat template (and no --raw); put the text into the prompt")
        return encode_text(text.tokenizer, prompt, "--prompt")
    before = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(text.tokenizer, [*before, {"role": "user", "content": prompt}], "--prompt")


def run(options: argparse.Namespace) -> int:
    """Answer the prompts that the arguments name; returns the exit status.

    Raises:
        UserError: something to correct.
    """
    sampling = read_sampling(options)
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in options.prompt]
    text = load_from_arguments(options)
    ids = [encode(text, prompt, options.system, raw=options.raw) for prompt in prompts]
    started = time.perf_counter()
    show: Callable[[str], Any] = (lambda piece: None) if options.json or len(prompts) > 1 else _write
    pieces = []
    for piece in text.stream(ids, max_new_tokens=options.max_new_tokens, sampling=sampling, stop=options.stop):
        pieces.append(piece)
        show(piece[0])
    seconds = time.perf_counter() - started
    answers = ["".join(row) for row in zip(*pieces)]
    if options.json:
        for prompt, answer in zip(prompts, answers):
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
    elif len(prompts) == 1:
        print()
    else:
        print("\n\n".join(f"> {prompt}\n{answer}" for prompt, answer in zip(prompts, answers)))
    print(f"{sum(map(len, ids))} prompt tokens, answered in {seconds:.1f} s (with compiling)", file=sys.stderr)
    return 0


def _write(piece: str) -> None:
    print(piece, end="", flush=True)
