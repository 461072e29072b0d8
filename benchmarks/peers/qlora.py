"""QLoRA cases of `bench_train.py` through PyTorch, a row printed for each: Unsloth, or transformers with PEFT and
bitsandbytes.

    python benchmarks/peers/qlora.py --system hf --model /tmp/llama3-8b-random --cases fast=none:4x2048 full=full:4x2048
    python benchmarks/peers/qlora.py --system unsloth --model ... --cases balanced=offload:4x2048 packed=packed:2x2048
    python benchmarks/peers/qlora.py --system unsloth --model ... --rank 32 --limit 24 --cases context_24=longest:1x8192
    python benchmarks/peers/qlora.py --system unsloth --model ... --fp8 --cases fast_fp8=none:4x2048

Needs torch, transformers, peft, bitsandbytes and, for its system, unsloth (for `packed` trl and datasets too); jaxtune
and JAX are not imported. The work is that of `configs/llama3-8b-random.yaml`: the same weights, texts, rank, targets
and optimizer, with the adapters of `--adapter` (a PEFT directory) where it is given, and else with such that are the
same for both systems. The model is loaded once; each case begins with its first adapters, a new optimizer and the peak
of torch's allocator reset. The loop is bare: forward, backward and update, synchronised, with autocast to bfloat16 as
their trainers have it. Adapters are in bfloat16 for `hf`, as TRL holds them, and in float32 for `unsloth`, as it does.

A case is NAME=KEEPS:BATCHxLENGTH[:STEPS]. KEEPS: none, full, or offload, which is Unsloth's own checkpointing; packed
(Unsloth): TRL's trainer with packing on the model's documents.jsonl, four micro-batches an update, that checkpointing;
longest (Unsloth): the longest row within `--limit`, found by trying, from what two short rows take. `--fp8`: Unsloth's
load_in_fp8, weights in 8 bits instead of 4 (through torchao, which writes them to files first), forward products too.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load_models import LINEARS, load_hf, load_unsloth

PACKAGES = {
    "hf": ("torch", "transformers", "peft", "bitsandbytes"),
    "unsloth": ("unsloth", "torch", "transformers", "peft", "bitsandbytes", "triton"),
}

# What a peer's code ends with where it cannot do a case.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError, OSError)


def keep(model: Any, system: str, mode: str) -> None:
    """Switch a loaded model to what a case keeps of its activations."""
    if system == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model, use_gradient_checkpointing=mode != "none")
    elif mode == "none":
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def draw_adapters(model: Any) -> None:
    """PEFT's law for new adapters, with the same values in every system: A uniform within 1 / sqrt(columns), B zero."""
    import torch

    for name, parameter in model.named_parameters():
        found = re.search(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])", name)
        if found is None:
            continue
        values = torch.zeros_like(parameter)
        if found[3] == "A":
            seed = 10_000 + 16 * int(found[1]) + LINEARS.index(found[2])
            generator = torch.Generator(device=parameter.device).manual_seed(seed)
            drawn = torch.rand(parameter.shape, generator=generator, device=parameter.device)
            values = (2 * drawn - 1) * parameter.shape[1] ** -0.5
        with torch.no_grad():
            parameter.copy_(values.to(parameter.dtype))


def take_adapter(model: Any, directory: Path) -> None:
    """Set every adapter matrix to that of a PEFT directory."""
    import torch
    from safetensors.torch import load_file

    values = load_file(directory / "adapter_model.safetensors")
    parameters = {
        name.replace(".default", ""): parameter for name, parameter in model.named_parameters() if "lora_" in name
    }
    if values.keys() != parameters.keys():
        raise SystemExit(f"{directory}: not the adapter of this model: {sorted(values.keys() ^ parameters.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name].to(parameter))


def batches(options: argparse.Namespace, case: Case, device: str) -> list[Any]:
    """Full rows [B, T] of token ids: the model's texts in the order of the file, one token a byte after the mark; or
    random ones, four batches, for `--random-tokens` and for rows longer than the texts."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    if options.random_tokens or case.keeps == "longest":
        generator = torch.Generator().manual_seed(3407)
        last = AutoConfig.from_pretrained(options.model).vocab_size - 300
        shape = case.batch, case.length
        return [torch.randint(1000, last, shape, generator=generator).to(device) for _ in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [json.loads(line)["text"] for line in (Path(options.model) / "train.jsonl").read_text().splitlines()]
    texts = texts[: case.batch * case.steps]
    rows = tokenizer(texts, truncation=True, max_length=case.length)["input_ids"]
    rows = [row for row in rows if len(row) == case.length]
    count = len(rows) // case.batch
    if not count:
        raise SystemExit(f"{options.model}/train.jsonl has no {case.batch} texts of {case.length} tokens")
    groups = (rows[i * case.batch : (i + 1) * case.batch] for i in range(count))
    return [torch.tensor(group, device=device) for group in groups]


class Trained:
    """A loaded model, whose adapters each case begins anew."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        import torch

        self.model, self.options, self.torch = model, options, torch
        self.on_gpu = torch.cuda.is_available()
        self.device = "cuda" if self.on_gpu else "cpu"
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.first = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    def begin(self, keeps: str) -> Any:
        """The first adapters again, and a new optimizer."""
        import bitsandbytes

        with self.torch.no_grad():
            for parameter, value in zip(self.parameters, self.first):
                parameter.copy_(value)
                parameter.grad = None
        gc.collect()
        if self.on_gpu:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()
        keep(self.model, self.options.system, keeps)
        return bitsandbytes.optim.AdamW8bit(self.parameters, lr=2e-4, weight_decay=0.01)

    def wait(self) -> float:
        """The time, when the device is done."""
        if self.on_gpu:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float | None:
        """GiB since `begin`."""
        return round(self.torch.cuda.max_memory_allocated() / 2**30, 3) if self.on_gpu else None

    def update(self, optimizer: Any, tokens: Any) -> tuple[float, float]:
        """Loss and seconds of one update."""
        begun = self.wait()
        with self.torch.autocast(self.device, dtype=self.torch.bfloat16):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), self.wait() - begun


def steps(trained: Trained, case: Case) -> dict[str, Any]:
    """A whole case: its figures."""
    data, optimizer = batches(trained.options, case, trained.device), trained.begin(case.keeps)
    losses, seconds = zip(*(trained.update(optimizer, data[step % len(data)]) for step in range(case.steps)))
    if trained.options.dump is not None and case is trained.options.cases[-1]:
        dump(trained, data, losses)
    tokens = case.batch * case.length
    return figures([1e3 * second for second in seconds[3:]], tokens) | {
        "peak_gib": trained.peak(),
        "seconds": {"first_step": round(seconds[0], 2)},
        "losses": [round(losses[i], 4) for i in (0, 1, 2, 3, 4, 10) if i < len(losses)],
    }


def figures(milliseconds: list[float], tokens: float) -> dict[str, Any]:
    """Median, spread and rate of steps of so many tokens."""
    median, quartiles = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=4)
    return {
        "tokens_per_s": round(tokens / median * 1e3),
        "ms_per_step": round(median, 1),
        "spread_ms": round(quartiles[2] - quartiles[0], 1),
    }


def dump(trained: Trained, data: list[Any], losses: Sequence[float]) -> None:
    """Into `--dump`: the adapters that a case began with, as PEFT saves them, its batches and its losses."""
    import numpy

    directory = trained.options.dump
    trained.begin("none")
    trained.model.save_pretrained(directory)
    numpy.save(directory / "batches.npy", numpy.stack([batch.cpu().numpy() for batch in data]))
    (directory / "losses.json").write_text(json.dumps(losses) + "\n")


def longest(trained: Trained, case: Case) -> dict[str, Any]:
    """The longest row, in steps of 1,024 tokens, that one update of fits the limit; each try in `tried`."""
    torch, tried = trained.torch, {}
    limit = int(trained.options.limit * 2**30)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    # Unsloth sizes its pieces by what the card has free: that is of a card of this size.
    torch.cuda.mem_get_info = lambda *_: (limit - torch.cuda.memory_reserved(), limit)

    def attempt(length: int) -> tuple[float, float] | None:
        """Peak in GiB and seconds; None where memory does not suffice."""
        for module in trained.model.modules():
            # Unsloth cuts rows to the length that it was loaded for.
            if hasattr(module, "max_seq_length"):
                module.max_seq_length = length
        optimizer = trained.begin("offload")
        (tokens, *_) = batches(trained.options, dataclasses.replace(case, batch=1, length=length), trained.device)
        try:
            _, seconds = trained.update(optimizer, tokens)
        except torch.OutOfMemoryError:
            tried[length] = "out of memory"
            return None
        tried[length] = f"{trained.peak()} GiB, {seconds:.1f} s"
        return trained.peak() or 0.0, seconds

    short, double = attempt(case.length), attempt(2 * case.length)
    if short is None or double is None:
        return {"failed": str(tried)}
    slope = (double[0] - short[0]) / case.length
    length = int(case.length + (limit / 2**30 - short[0]) / slope) // 1024 * 1024
    while (found := attempt(length)) is None and length > 2 * case.length:
        length = int(0.97 * length) // 1024 * 1024
    if found is None:
        return {"failed": str(tried)}
    rate = {"tokens_per_s": round(length / found[1]), "ms_per_step": round(1e3 * found[1], 1), "spread_ms": 0.0}
    return {"seq": length, **rate, "peak_gib": found[0], "limit_gib": trained.options.limit, "tried": tried}


def packed(trained: Trained, case: Case) -> dict[str, Any]:
    """TRL's trainer with packing on documents of usual lengths; tokens a second of the documents alone."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    options, seconds = trained.options, []
    texts = [json.loads(line)["text"] for line in (Path(options.model) / "documents.jsonl").read_text().splitlines()]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = trained.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(trained.wait() - self.begun)

    trained.begin("offload")
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_length=case.length,
            packing=True,
            dataset_text_field="text",
            per_device_train_batch_size=case.batch,
            gradient_accumulation_steps=4,
            max_steps=case.steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            optim="adamw_8bit",
            report_to="none",
            bf16=trained.on_gpu,
            use_cpu=not trained.on_gpu,
            save_strategy="no",
            dataset_num_proc=1,
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        # A trainer wants one for padding, which packed rows have none of.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = SFTTrainer(
            model=trained.model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"text": texts}),
            args=settings,
            callbacks=[Clock()],
        )
        rows = trainer.train_dataset["input_ids"]
        trainer.train()
    of_row = sum(map(len, rows)) / len(rows)
    first = {"first_step": round(seconds[0], 2)}
    return figures([1e3 * second for second in seconds[3:]], 4 * case.batch * of_row) | {
        "peak_gib": trained.peak(),
        "seconds": first,
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of the command line."""

    name: str
    keeps: str
    batch: int
    length: int
    steps: int

    @classmethod
    def of(cls, text: str) -> Case:
        """Read NAME=KEEPS:BATCHxLENGTH[:STEPS]."""
        found = re.fullmatch(r"(\w+)=(none|full|offload|packed|longest):(\d+)x(\d+)(?::(\d+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=KEEPS:BATCHxLENGTH[:STEPS]")
        name, keeps, batch, length, count = found.groups()
        return cls(name, keeps, int(batch), int(length), int(count or (8 if keeps == "packed" else 14)))

    @property
    def offloads(self) -> bool:
        """Whether it keeps layers' inputs on the host."""
        return self.keeps not in ("none", "full")


def main() -> None:
    """The command line."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description="QLoRA cases through PyTorch.")
    parser.add_argument("--system", choices=sorted(PACKAGES), required=True)
    parser.add_argument("--model", required=True, help="directory of make_random_model.py")
    parser.add_argument("--cases", nargs="+", type=Case.of, required=True, help="NAME=KEEPS:BATCHxLENGTH[:STEPS]")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--limit", type=float, default=24.0, help="GiB that torch's allocator may take, of `longest`")
    parser.add_argument("--adapter", type=Path, help="PEFT directory whose matrices training starts from")
    parser.add_argument("--random-tokens", action="store_true", help="batches of random token ids")
    parser.add_argument("--dump", type=Path, help="directory for the last case's first adapters, batches and losses")
    parser.add_argument("--save-4bit", type=Path, help="directory for the model as bitsandbytes holds it; of hf")
    parser.add_argument("--fp8", action="store_true", help="weights and forward products in 8 bits; of unsloth")
    options = parser.parse_args()
    if options.fp8 and options.system != "unsloth":
        parser.error("--fp8 is Unsloth's")
    modes = {case.keeps for case in options.cases}
    if options.system == "hf" and not modes <= {"none", "full"}:
        parser.error("transformers keeps layer inputs on the device: cases of none or full")
    if options.system == "unsloth" and "full" in modes and len(modes - {"none"}) > 1:
        parser.error("Unsloth's own checkpointing replaces torch's: no case of full beside one of offload")

    def row_of(case: Case) -> dict[str, Any]:
        row: dict[str, Any] = {"case": case.name, "system": options.system, "policy": case.keeps}
        return row | {"compute": "fp8" if options.fp8 else "bf16", "batch": case.batch, "seq": case.length}

    try:
        model = (load_unsloth if options.system == "unsloth" else load_hf)(options)
    except FAILURES as error:
        traceback.print_exc()
        for case in options.cases:
            print(json.dumps(row_of(case) | {"failed": f"loading: {type(error).__name__}: {error}"[-400:]}), flush=True)
        raise SystemExit(1) from error
    if options.adapter is None:
        draw_adapters(model)
    else:
        take_adapter(model, options.adapter)
    trained = Trained(model, options)
    ready = round(trained.wait() - started, 1)
    versions = {name: version(name) for name in (*PACKAGES[options.system], *(["torchao"] if options.fp8 else []))}
    for case in options.cases:
        row = row_of(case)
        try:
            row |= {"packed": packed, "longest": longest}.get(case.keeps, steps)(trained, case)
        except FAILURES as error:
            # One case's end is not the others'.
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}"[-400:]
        row["seconds"] = {"ready": ready, **row.get("seconds", {})}
        print(json.dumps(row | {"versions": versions}), flush=True)


if __name__ == "__main__":
    main()
