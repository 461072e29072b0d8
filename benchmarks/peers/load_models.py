"""The models of `qlora.py`, with their adapters: through Unsloth, or transformers with PEFT and bitsandbytes."""

from __future__ import annotations

import argparse
import os
from typing import Any

# Both read these when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_unsloth(options: argparse.Namespace) -> Any:
    """Model with adapters, its layers ready for each of the cases' checkpointing."""
    from unsloth import FastLanguageModel

    mode: Any = "unsloth" if any(case.offloads for case in options.cases) else True
    length = max(case.length for case in options.cases)
    model, _ = FastLanguageModel.from_pretrained(
        options.model,
        max_seq_length=length,
        load_in_4bit=not options.fp8,
        load_in_fp8=options.fp8,
        use_gradient_checkpointing=mode,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing=mode,
        max_seq_length=length,
    )
    FastLanguageModel.for_training(model)
    return model


def load_hf(options: argparse.Namespace) -> Any:
    """Model with adapters in bfloat16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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
    if options.save_4bit is not None:
        model.save_pretrained(options.save_4bit)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.save_4bit)
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, bias="none", target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.enable_input_require_grads()
    return model
