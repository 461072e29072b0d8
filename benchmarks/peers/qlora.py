"""One QLoRA case of `bench_train.py` through PyTorch, printed as one row: Unsloth, or transformers with PEFT and
bitsandbytes.

    python benchmarks/peers/qlora.py --system hf --model /tmp/llama3-8b-random --checkpointing none

Needs torch, transformers, peft, bitsandbytes and, for its system, unsloth; jaxtune and JAX are not imported. The work
is that of `configs/llama3-8b-random.yaml`: the same weights, texts, rank, targets and optimizer, with the adapters of
`--adapter` (a PEFT directory) where it is given. The loop is bare: forward, backward and update, synchronised, with
autocast to bfloat16 as their trainers have it. Adapters are in bfloat16 for `hf`, as TRL holds them, and in float32 for
`unsloth`, as it does. The peak is that of torch's allocator since the process began.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Both read these when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = {
    "hf": ("torch", "transformers", "peft", "bitsandbytes"),
    "unsloth": ("unsloth", "torch", "transformers", "peft", "bitsandbytes", "triton"),
}


def load_unsloth(options: argparse.Namespace) -> Any:
    """Model with adapters; checkpointing: none, full, or offload, which Unsloth calls by its own name."""
    from unsloth import FastLanguageModel

    mode = {"none": False, "full": True, "offload": "unsloth"}[options.checkpointing]
    model, _ = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.length, load_in_4bit=True, use_gradient_checkpointing=mode
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing=mode,
        max_seq_length=options.length,
    )
    FastLanguageModel.for_training(model)
    return model


def load_hf(options: argparse.Namespace) -> Any:
    """Model with adapters in bfloat16; checkpointing: none or full."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
        quantization_config=quantization,
    )
    model.config.use_cache = False
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, bias="none", target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if options.checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


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


def batches(options: argparse.Namespace, device: str) -> list[Any]:
    """Full rows of the run's texts in the order of the file: [B, T] token ids, one token a byte after the mark."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [json.loads(line)["text"] for line in (Path(options.model) / "train.jsonl").read_text().splitlines()]
    rows = tokenizer(texts, truncation=True, max_length=options.length)["input_ids"]
    rows = [row for row in rows if len(row) == options.length]
    count = len(rows) // options.batch
    if not count:
        raise SystemExit(f"{options.model}/train.jsonl has no {options.batch} texts of {options.length} tokens")
    groups = (rows[i * options.batch : (i + 1) * options.batch] for i in range(count))
    return [torch.tensor(group, device=device) for group in groups]


def main() -> None:
    """The command line."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description="One QLoRA case through PyTorch.")
    parser.add_argument("--system", choices=sorted(PACKAGES), required=True)
    parser.add_argument("--model", required=True, help="directory of make_random_model.py")
    parser.add_argument("--checkpointing", choices=["none", "full", "offload"], required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--adapter", type=Path, help="PEFT directory whose matrices training starts from")
    parser.add_argument("--case", default="", help="name in the row")
    options = parser.parse_args()
    if options.system == "hf" and options.checkpointing == "offload":
        parser.error("transformers keeps layer inputs on the device: --checkpointing none or full")

    model = (load_unsloth if options.system == "unsloth" else load_hf)(options)
    import bitsandbytes
    import torch

    if options.adapter is not None:
        take_adapter(model, options.adapter)
    model.train()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=2e-4, weight_decay=0.01)
    data = batches(options, device)
    wait()
    ready, seconds, losses = time.perf_counter(), [], []
    for step in range(options.steps):
        wait()
        begun = time.perf_counter()
        tokens = data[step % len(data)]
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        seconds.append(time.perf_counter() - begun)
        losses.append(round(float(loss.detach()), 4))
    timed = [1e3 * second for second in seconds[options.warm_up :]]
    quartiles = statistics.quantiles(timed, n=4)
    median = statistics.median(timed)
    row = {
        "case": options.case,
        "system": options.system,
        "policy": options.checkpointing,
        "compute": "bf16",
        "batch": options.batch,
        "seq": options.length,
        "tokens_per_s": round(options.batch * options.length / median * 1e3),
        "ms_per_step": round(median, 1),
        "spread_ms": round(quartiles[2] - quartiles[0], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "seconds": {"ready": round(ready - started, 1), "first_step": round(seconds[0], 2)},
        "losses": [losses[i] for i in (0, 1, 2, 3, 4, 10) if i < len(losses)],
        "versions": {name: version(name) for name in PACKAGES[options.system]},
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
