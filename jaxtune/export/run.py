"""Export a finished run, or a base model alone: write it, read it back, compare, and only then give it its name."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from convert import families, flax_tree
from convert.checkpoint import open_checkpoint
from convert.merge import Base
from convert.output import atomic_directory
from convert.peft_modules import load_modules
from jaxtune.config import DataConfig, LoraConfig, ModelConfig
from jaxtune.config_data import IN_MEMORY
from jaxtune.config_io import load_config
from jaxtune.data.dataset import build
from jaxtune.errors import UserError
from jaxtune.export.adapter import load_peft_adapter, save_peft_adapter
from jaxtune.export.modules import with_modules
from jaxtune.export.targets import (
    Subject,
    Written,
    write_flax,
    write_gguf_lora,
    write_ggufs,
    write_merged,
    write_merged_4bit,
)
from jaxtune.linear import Adaptation
from jaxtune.loading import (
    Source,
    adapter_tokenizer,
    load_model,
    load_tokenizer,
    resolve_dtype,
    resolve_source,
    user_errors,
)
from jaxtune.lora import adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.verify import Comparison, compare, text_logits

TARGETS = ("peft", "merged", "merged-4bit", "gguf", "gguf-lora", "flax")
# The largest difference of logits (jaxtune.verify.Comparison) that an export may have: of nothing changed, of weights
# rounded to 16 bits and run in them, of 8 bits, and of weights quantised anew or other than the adapter was trained on.
LIMITS = {"exact": 1e-4, "16 bits": 0.05, "8 bits": 0.15, "quantised": 0.6}
# Of the loss, in nats a token: what is less may be chance on so short a text.
_SMALLEST_GAIN = 0.05
# Rows and tokens of a row that are compared: enough to see a wrong weight, few enough to hold their logits.
_ROWS, _ROW_LENGTH = 2, 256


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What is written and how it is checked.

    target: one of `TARGETS`. peft: the adapter. merged: dense safetensors. merged-4bit: bitsandbytes NF4. gguf: files
        for llama.cpp, and an Ollama Modelfile. gguf-lora: the adapter for llama.cpp. flax: the parameter trees.
    out: directory; made whole or not at all.
    base: what the adapter is added to: "dequantized", the weights it was trained with, or "original", the stored ones.
    dtype: of merged weights: bf16, fp16 or fp32. file_types: GGUF types, one file each.
    text: a text file to compare logits on; None for the run's held-out data, or else its training data.
    verify: read back what was written and compare logits. max_difference: their largest; None for that of `LIMITS`.
    overwrite: replace what is at `out`.
    """

    target: str
    out: Path
    base: Base = "dequantized"
    dtype: str = "bf16"
    file_types: tuple[str, ...] = ("Q4_K_M",)
    text: Path | None = None
    verify: bool = True
    max_difference: float | None = None
    overwrite: bool = False


def export_run(run: str | Path, config: ExportConfig) -> Path:
    """Write the model that a run has made.

    Args:
        run: the run's output.dir, with config.yaml and adapter/.
        config: what to write.

    Returns:
        The directory written.

    Raises:
        UserError: something missing, something in the way, or logits too far from the run's: nothing is left then.
        NotImplementedError: a model that the target has no form for.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file() or not (run / "adapter").is_dir():
        raise UserError(f"{run}: no finished run, which has config.yaml and adapter/; name a run's output.dir")
    settings = load_config(run / "config.yaml")
    return _export(settings.model, run / "adapter", settings.data, config)


def export_model(model: ModelConfig, config: ExportConfig) -> Path:
    """Write a base model alone; else as `export_run`, but for the targets that are adapters.

    Raises:
        UserError: as `export_run`; an adapter is asked for; or a comparison without a text.
    """
    if config.target in ("peft", "gguf-lora"):
        raise UserError(f"--to {config.target} writes an adapter, and --model has none; name a --run")
    return _export(model, None, None, config)


def _export(model: ModelConfig, adapter: Path | None, data: DataConfig | None, config: ExportConfig) -> Path:
    source = resolve_source(model)
    own_tokenizer = None if adapter is None else adapter_tokenizer(adapter)
    tokenizer = load_tokenizer(source) if own_tokenizer is None else own_tokenizer
    verify = config.verify and config.target not in ("peft", "gguf-lora")
    batch = _held_out(tokenizer, data, config.text) if verify else {}
    dtype = resolve_dtype(model.dtype)
    with user_errors():
        checkpoint = open_checkpoint(source.path)
    hf_config = checkpoint.hf_config
    decoder = DecoderConfig.from_hf(hf_config)
    lora: dict[str, Any] = {}
    adapted, lora_config = Adaptation(), None
    modules: dict[str, np.ndarray] = {}
    if adapter is not None:
        with user_errors():
            modules, hf_config = load_modules(adapter, families.completed(hf_config))
        decoder = DecoderConfig.from_hf(hf_config)
        lora, lora_config = load_peft_adapter(adapter, decoder=decoder, allow_modules=True)
        adapted = adaptation(lora_config)
    # Kept in a list, since it must be gone before what was written is read back: both may not fit.
    frozen = [load_model(model, dtype, source=source).frozen]
    if modules:
        frozen = [with_modules(frozen.pop(), modules, checkpoint.hf_config, hf_config, dtype)]

    logits = functools.partial(text_logits, batch=batch, decoder=decoder, dtype=dtype)
    reference = logits(frozen[0], lora, adaptation=adapted) if verify else None
    without = None
    if reference is not None and lora:
        without = compare(reference, logits(frozen[0], {}, adaptation=Adaptation()), batch)
        _say(f"without the adapter: {without}")
    with user_errors(), atomic_directory(config.out, overwrite=config.overwrite) as directory:
        of_modules = hf_config if modules else None
        subject = Subject(checkpoint, frozen.pop(), lora, adapted.scaling, modules, of_modules, own_tokenizer)
        written = _write(directory, subject, config, source, tokenizer, lora_config)
        del subject
        for one in written:
            if reference is None:
                break
            if config.target == "flax":
                variables = flax_tree.load_tree(one.path)
                again = logits(variables["params"], variables.get("lora", {}), adaptation=adapted)
            else:
                # A head in fewer bits was written decoded.
                settings = dataclasses.replace(model, revision=None, sha256=None, head="dtype")
                settings = dataclasses.replace(settings, name_or_path=str(one.path), load_in_4bit=one.packed)
                again = logits(load_model(settings, dtype).frozen, {}, adaptation=Adaptation())
            _judge(one, compare(reference, again, batch), without, config.max_difference)
    return config.out


def _held_out(tokenizer: Any, data: DataConfig | None, text: Path | None) -> dict[str, np.ndarray]:
    """A few packed rows: of a text file, of the run's held-out records, or of those it was trained on."""
    if text is not None:
        tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        if len(tokens) < 2:
            raise UserError(f"--text {text}: {len(tokens)} tokens, too few to compare logits on; name a longer text")
        rows = min(max(len(tokens) // _ROW_LENGTH, 1), _ROWS)
        ids = np.array(tokens[: rows * _ROW_LENGTH], np.int32).reshape(rows, -1)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        return {"tokens": ids, "positions": positions, "segment_ids": np.ones_like(ids)}
    if data is None:
        raise UserError("there is no text to compare logits on; name one with --text FILE, or skip it with --no-verify")
    if data.train == IN_MEMORY:
        raise UserError(
            "the run's records were in memory, and are not there to compare logits on; name a text with --text FILE, "
            "or skip it with --no-verify"
        )
    split = "eval" if data.eval_fraction is not None else next(iter(data.eval_sets), "train")
    batch = next(build(data, tokenizer, split).eval_batches(_ROWS))
    return {name: np.asarray(batch[name][:, :_ROW_LENGTH]) for name in ("tokens", "positions", "segment_ids")}


def _judge(written: Written, found: Comparison, without: Comparison | None, limit: float | None) -> None:
    """Say how far what was written is from the model, and refuse what is too far.

    Quantising merged weights anew may round a small adapter away, which a limit on logits alone would not tell from
    the quantisation's own error: at least half of what the adapter gained must be left, unless a limit was asked for.
    """
    name = written.path.name if written.path.is_file() else "read back"
    _say(f"{name}: {found}")
    # A comparison with NaN is too far as well.
    if not found.difference <= (LIMITS[written.precision] if limit is None else limit):
        raise UserError(
            f"export refused: {name}: {found}, and the limit is {limit or LIMITS[written.precision]:.2%}. Nothing was "
            "kept. If this is what you expect of the chosen form, raise --max-difference"
        )
    if limit is None and without is not None:
        gain = without.loss - found.reference_loss
        if gain > _SMALLEST_GAIN and without.loss - found.loss < gain / 2:
            raise UserError(
                f"export refused: {name}: loss {found.loss:.4f}, where the model has {found.reference_loss:.4f} and "
                f"its base alone {without.loss:.4f}: rounding has taken most of the adapter away. Nothing was kept. "
                "Export --to merged, a finer --type, or the adapter beside its base (--to peft, --to gguf-lora); "
                "or accept it with --max-difference"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(
    directory: Path,
    subject: Subject,
    config: ExportConfig,
    source: Source,
    tokenizer: Any,
    lora_config: LoraConfig | None,
) -> list[Written]:
    name = config.out.resolve().parent.name if config.out.name == config.target else config.out.name
    if config.target == "merged":
        return write_merged(directory, subject, config.base, config.dtype)
    if config.target == "merged-4bit":
        return write_merged_4bit(directory, subject, config.base, config.dtype)
    if config.target == "gguf":
        return write_ggufs(directory, subject, config.base, config.file_types, name, tokenizer)
    if config.target == "gguf-lora":
        return write_gguf_lora(directory, subject, name)
    if config.target == "flax":
        return write_flax(directory, subject)
    assert lora_config is not None, config.target
    decoder = DecoderConfig.from_hf(subject.model.hf_config)
    modules = subject.modules
    save_peft_adapter(
        directory, subject.lora, lora_config, source, decoder=decoder, modules=modules, tokenizer=tokenizer
    )
    return []
