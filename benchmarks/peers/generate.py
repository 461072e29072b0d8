"""Generation through PyTorch, printed as one row a case: Unsloth, or transformers with PEFT and bitsandbytes.

    python benchmarks/peers/generate.py --system hf --model /tmp/llama3-8b-random

The work is that of `benchmarks/bench_generate.py`: NF4 with double quantisation, an adapter of rank 16 on all seven
linears, greedy, random prompts, a fixed number of new tokens, embedding and head in bfloat16 on the device. A token's
time is what `generate` takes for all of them less what it takes for the first one, which is the prompt's; medians of
several calls after one that warms up. Packages are those of `qlora.py`, which loads the model. The peak is that of
torch's allocator, from after loading on. Rows have the names of `bench_generate.py`'s, and the system's; a case that
fails is one, with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

from load_models import load_hf, load_unsloth
from qlora import FAILURES, PACKAGES, Case

# batch, tokens of each prompt, tokens to make.
CASES = {
    "batch-1": (1, 64, 256),
    "batch-16": (16, 64, 256),
    "prompt-2048": (1, 2048, 64),
}


def measure(model: Any, name: str, new: int | None, repeats: int) -> dict[str, Any]:
    """One case with a model that is ready to generate."""
    import torch

    batch, prompt, count = CASES[name]
    count = count if new is None else new
    on_gpu = torch.cuda.is_available()
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator)
    ids = ids.to("cuda" if on_gpu else "cpu")

    def seconds(tokens: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        if on_gpu:
            torch.cuda.synchronize()
        assert out.shape == (batch, prompt + tokens), out.shape
        return time.perf_counter() - begun

    held = torch.cuda.memory_allocated() if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds(2)
    first = statistics.median(seconds(1) for _ in range(repeats))
    each = [(seconds(count) - first) / (count - 1) for _ in range(repeats)]
    a_token = statistics.median(each)
    return {
        "case": name,
        "batch": batch,
        "prompt": prompt,
        "new": count,
        "head": "dtype",
        "embedding_on_host": False,
        "compute": "bfloat16",
        "tokens_per_s": round(batch / a_token, 1),
        "ms_per_token": round(a_token * 1e3, 3),
        "spread_ms": round((max(each) - min(each)) * 1e3, 3),
        "ms_to_first_token": round(first * 1e3, 1),
        "weights_gib": None if held is None else round(held / 2**30, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generation through PyTorch.")
    parser.add_argument("--system", choices=sorted(PACKAGES), required=True)
    parser.add_argument("--model", required=True, help="directory of make_random_model.py")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--new", type=int, help="tokens to make instead of the case's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wait", action="store_true", help="between loading and timing: for a line of input")
    options = parser.parse_args()
    # What the loading of qlora.py asks of its options: one case of rows that hold any of these.
    case = Case("generation", "none", 1, 4096, 0)
    loading = argparse.Namespace(model=options.model, cases=[case], rank=16, fp8=False, save_4bit=None)
    model = (load_unsloth if options.system == "unsloth" else load_hf)(loading)
    if options.system == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    model.config.use_cache = True
    if options.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    versions = {name: version(name) for name in PACKAGES[options.system]}
    for name in options.cases:
        try:
            row = measure(model, name, options.new, options.repeats)
        except FAILURES as error:
            row = {"case": name, "failed": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"system": options.system, **row, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
