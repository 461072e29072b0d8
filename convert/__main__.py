"""`python -m convert`: checkpoints from one format to another, on any machine, without a GPU.

What needs the model to run, such as comparing logits before and after, is `python -m jaxtune.export`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from convert import bnb4bit
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.families.table import Load
from convert.gguf.adapter import write_gguf_adapter
from convert.gguf.mixture import FILE_TYPES
from convert.gguf.writer import write_gguf
from convert.inspect import inspect
from convert.merge import DTYPES, adapter_scaling, base_values, merged
from convert.output import atomic_directory, saved_tokenizer, tokenizer_of, write_description
from convert.peft import load_adapter
from convert.peft_modules import load_modules, placed
from convert.progress import Progress
from convert.safetensors_io import TensorInfo, refuse_existing, write_model
from pallas_kernels.nf4 import NF4Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for an error that the user can fix."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _inspect(options: argparse.Namespace) -> None:
    print(inspect(options.model))


def _to_safetensors(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.model)
    dtype = _dtype(checkpoint, options)
    infos, read, model = _tensors(checkpoint, options, dtype)
    with atomic_directory(options.out, overwrite=options.overwrite) as directory:
        write_model(directory, infos, read, max_shard_bytes=options.max_shard_bytes)
        write_description(directory, model, dtype=dtype, tokenizer=_own_tokenizer(options))


def _to_4bit(options: argparse.Namespace) -> None:
    checkpoint = model = open_checkpoint(options.model)
    dtype, double_quant = _dtype(checkpoint, options), not options.no_double_quant
    quantises = options.adapter is not None or not checkpoint.is_packed
    if not quantises:
        # What is packed keeps its bytes, and what was left dense stays so.
        stored = {load.slot.name: load for load in checkpoint.loads}
        # Views of the mapped files.
        tensors = {key: part for name, load in stored.items() for key, part in _stored_parts(checkpoint, name, load)}
        infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        read = tensors.__getitem__
        quantization = checkpoint.hf_config.get("quantization_config") or bnb4bit.quantization_config()
    else:
        linears = {load.slot.name for load in checkpoint.loads if load.slot.is_linear}
        dense, read, model = _tensors(checkpoint, options, dtype)
        infos, read = bnb4bit.packed_model(dense, read, linears, double_quant=double_quant)
        quantization = bnb4bit.quantization_config(compute_dtype=dtype.name, double_quant=double_quant)
    with atomic_directory(options.out, overwrite=options.overwrite) as directory:
        write_model(directory, infos, read, max_shard_bytes=options.max_shard_bytes, keep_order=quantises)
        own = _own_tokenizer(options)
        write_description(directory, model, dtype=dtype, quantization=quantization, tokenizer=own)


def _stored_parts(checkpoint: Checkpoint, name: str, load: Load) -> Iterable[tuple[str, np.ndarray]]:
    """The tensors of one stored weight, packed or dense."""
    value = checkpoint.stored(load)
    return (bnb4bit.unpack(name, value) if isinstance(value, NF4Tensor) else {name: value}).items()


def _to_gguf(options: argparse.Namespace) -> None:
    refuse_existing([Path(options.out)], overwrite=options.overwrite)
    checkpoint = open_checkpoint(options.model)
    infos, read, model = _tensors(checkpoint, options, DTYPES["fp32"])
    tokenizer = _own_tokenizer(options) or tokenizer_of(checkpoint)
    write_gguf(
        options.out, model.hf_config, infos, read, tokenizer, file_type=options.type, overwrite=options.overwrite
    )


def _adapter_to_gguf(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.model)
    lora, scaling = _adapter(checkpoint, options.adapter)
    write_gguf_adapter(
        options.out,
        checkpoint.hf_config,
        lora,
        scaling,
        rows=checkpoint.linear_rows,
        file_type=options.type,
        overwrite=options.overwrite,
    )


def _own_tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerFast | None:
    """The tokenizer that was saved beside the adapter, if there is one."""
    return None if options.adapter is None else saved_tokenizer(Path(options.adapter))


def _adapter(checkpoint: Checkpoint, directory: str, *, allow_modules: bool = False) -> tuple[dict[str, Any], float]:
    """The adapter's tree and the factor on B A; ValueError where it is another model's."""
    model_type = checkpoint.hf_config["model_type"]
    lora, fields = load_adapter(
        directory, model_type=model_type, rows=checkpoint.linear_rows, allow_modules=allow_modules
    )
    slots = checkpoint.family.slots(checkpoint.hf_config)
    shapes = {slot.path[1:-1]: slot.shape for slot in slots if slot.is_linear}
    layers = checkpoint.hf_config["num_hidden_layers"]
    for group, linears in lora["layers"].items():
        for name, node in linears.items():
            (rows, columns), a, b = shapes[group, name], node["lora_A"].shape, node["lora_B"].shape
            if (a[0], b[1], a[2]) != (layers, rows, columns):
                raise ValueError(
                    f"{directory}: its {name} is for {a[0]} layers of [{b[1]}, {a[2]}], the base model has {layers} of "
                    f"[{rows}, {columns}]; name the base model that the adapter was trained on"
                )
    return lora, adapter_scaling(fields)


def _tensors(checkpoint: Checkpoint, options: argparse.Namespace, dtype: np.dtype) -> Any:
    """The model's dense tensors with the adapter in them if there is one, and progress; and what describes them."""
    slots = [load.slot for load in checkpoint.loads]
    if options.adapter is None:
        model, values = checkpoint, base_values(checkpoint, "original")
        lora, scaling = dict[str, Any](), 1.0
    else:
        lora, scaling = _adapter(checkpoint, options.adapter, allow_modules=True)
        modules, hf_config = load_modules(options.adapter, checkpoint.hf_config)
        values = placed(base_values(checkpoint, options.base), modules, slots)
        model = dataclasses.replace(checkpoint, hf_config=hf_config)
        slots = model.family.slots(hf_config) if modules else slots
    infos, read = merged(slots, values, lora, scaling, dtype)
    return infos, Progress(Path(options.out).name, len(infos)).watch(read), model


def _dtype(checkpoint: Checkpoint, options: argparse.Namespace) -> np.dtype:
    """What was asked for; else the stored dtype, or bfloat16 where that is none of a dense model."""
    if options.dtype is not None:
        return DTYPES[options.dtype]
    stored = checkpoint.infos["model.embed_tokens.weight"].dtype
    return stored if checkpoint.gguf is None and stored in DTYPES.values() else DTYPES["bf16"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert", description="Convert checkpoints from file to file.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, adapter: str | None = "--adapter") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run, adapter=None)
        sub.add_argument("model", metavar="MODEL", help="a model's directory, or a .gguf file")
        if run is _inspect:
            return sub
        if adapter is not None:
            sub.add_argument(adapter, metavar="ADAPTER", help="directory of a PEFT adapter")
        sub.add_argument("--out", required=True, help="where to write; nothing is overwritten unasked")
        sub.add_argument("--overwrite", action="store_true", help="replace what is there")
        return sub

    def bases(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--base",
            choices=("dequantized", "original"),
            default="dequantized",
            help="what the adapter is added to: the weights as a 4-bit run had them (default), or as they are stored",
        )

    command("inspect", _inspect, "show what a checkpoint or an adapter holds")
    for name, adapter in (("merge", "adapter"), ("to-safetensors", None)):
        help = "write dense safetensors" + (" of a model with an adapter merged into it" if adapter else "")
        sub = command(name, _to_safetensors, help, adapter)
        sub.add_argument("--dtype", choices=tuple(DTYPES), help="by default as stored; bf16 of GGUF files")
        sub.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
        bases(sub)
    sub = command("to-4bit", _to_4bit, "write a bitsandbytes NF4 checkpoint")
    sub.add_argument("--dtype", choices=tuple(DTYPES), help="of what is not packed; by default as stored")
    sub.add_argument("--no-double-quant", action="store_true", help="keep float32 scales")
    sub.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
    bases(sub)
    sub = command("to-gguf", _to_gguf, "write a GGUF file for llama.cpp and Ollama")
    sub.add_argument("--type", choices=tuple(FILE_TYPES), default="Q4_K_M")
    bases(sub)
    sub = command("adapter-to-gguf", _adapter_to_gguf, "write an adapter as GGUF, for llama.cpp's --lora", "adapter")
    sub.add_argument("--type", choices=("F16", "F32"), default="F16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
