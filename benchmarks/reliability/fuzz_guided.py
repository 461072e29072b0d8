"""`fuzz_files.py` led by coverage: a mutation that reaches code which none before has reached is built upon.

    pip install atheris && python benchmarks/reliability/fuzz_guided.py --seconds 60

Each kind of file that our own code parses (safetensors, bitsandbytes' states, GGUF, configurations, config.json, PEFT)
is a process of its own, in which libFuzzer by way of atheris chooses bytes. What counts as a finding is said in
`fuzz_files.py`. Exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["convert", "jaxtune"]):
    import fuzz_files

KINDS = (
    *("configuration", "safetensors", "config.json", "index", "bitsandbytes header", "GGUF"),
    *("PEFT adapter_config.json", "PEFT adapter_model.safetensors"),
)


def guided(name: str, seconds: int, keep: Path) -> None:
    """One kind of file, until the time is over; does not return."""
    fuzz_files.quiet()
    directory = Path(tempfile.mkdtemp())
    fuzz_files.prepare(directory)
    target = next(target for target in fuzz_files.targets(directory / "good") if target.name == name)
    corpus = directory / "corpus"
    corpus.mkdir()
    (corpus / "good").write_bytes((target.directory / target.victim).read_bytes())
    count = 0

    def one(content: bytes) -> None:
        nonlocal count
        count += 1
        outcome = fuzz_files.attempt_once(target, content, directory / f"{count}")
        if outcome.startswith("FINDING"):
            print(f"{name}: {fuzz_files.kept(target, content, keep, f'guided-{count}')}: {outcome}", flush=True)

    settings = [f"-max_total_time={seconds}", "-handle_alrm=0", "-print_final_stats=1", "-max_len=200000"]
    atheris.Setup([sys.argv[0], *settings, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Damage the files that a user may bring, led by coverage.")
    parser.add_argument("--seconds", type=int, default=60, help="for each kind of file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where files with findings go")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        guided(options.alone, options.seconds, options.keep)
    findings = total = 0
    for name in options.kinds:
        command = [sys.executable, __file__, "--alone", name, "--seconds", str(options.seconds)]
        done = subprocess.run([*command, "--keep", str(options.keep)], capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if "FINDING" in line]
        runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        if runs is None:
            print(done.stdout[-2000:], done.stderr[-2000:])
            return 1
        reached = re.findall(r" cov: (\d+)", done.stderr)
        print(f"{name}: {int(runs[1]):,} mutations, code places {reached[0]} to {reached[-1]}, {len(found)} findings")
        print(done.stdout, end="", flush=True)
        findings, total = findings + len(found), total + int(runs[1])
    print(f"{total:,} mutations, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
