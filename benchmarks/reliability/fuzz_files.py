"""Damage the files that a user may bring, over and over, and see that each is answered with one of our own sentences.

    python benchmarks/reliability/fuzz_files.py --mutations 20000

Of each kind of file (configuration, safetensors, bitsandbytes' states, GGUF, PEFT adapter, tokenizer, JSON Lines,
parquet) a good one is made; every
mutation changes bytes, cuts, doubles or drops parts of it, or swaps numbers and words for extreme ones. A reader may
take the file, or raise UserError, ValueError or NotImplementedError, but none of ValueError's kinds, which Python's own
parsers raise and which name no file. Anything else, more than five seconds of computation, or much more memory than the
file, is a finding: it is printed, and the file kept in `--keep`. Exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from runs import COLOURS, CONFIG, RUN, question, save_model, save_records  # noqa: E402

from convert import families  # noqa: E402
from convert.__main__ import main as convert  # noqa: E402
from convert.checkpoint import open_checkpoint  # noqa: E402
from convert.gguf.writer import write_gguf  # noqa: E402
from convert.safetensors_io import TensorInfo  # noqa: E402
from jaxtune.config import DataConfig, LoraConfig, ModelConfig  # noqa: E402
from jaxtune.config_io import load_config  # noqa: E402
from jaxtune.data.dataset import build  # noqa: E402
from jaxtune.errors import UserError  # noqa: E402
from jaxtune.export import load_peft_adapter, save_peft_adapter  # noqa: E402
from jaxtune.loading import load_tokenizer, resolve_source  # noqa: E402
from jaxtune.lora import init_lora  # noqa: E402
from jaxtune.models.config import DecoderConfig  # noqa: E402

SECONDS, MEMORY = 5, 512 * 2**20
EXTREMES = (b"-1", b"0", b"18446744073709551615", b"1e400", b"null", b"[]", b"{}", b'""', b"\xff\xfe", b"\x00" * 8)


@dataclasses.dataclass(frozen=True)
class Target:
    """directory: of a good set of files. victim: which of them is damaged. read: what takes the directory. inside: a
    word of the JSON in the victim that alone is damaged, and keeps its length.
    """

    name: str
    directory: Path
    victim: str
    read: Callable[[Path], Any]
    inside: bytes | None = None

    def damaged(self, content: bytes, rng: random.Random) -> bytes:
        """The victim's content after a mutation."""
        if self.inside is None:
            return mutate(content, rng)
        start = content.rindex(b"{", 0, content.index(self.inside))
        end = content.index(b"}", start) + 1
        changed = mutate(content[start:end], rng)[: end - start].ljust(end - start)
        return content[:start] + changed + content[end:]


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for one of its own."""


def targets(root: Path) -> Iterator[Target]:
    """A good set of files of each kind."""
    model = root / "model"
    model.mkdir()
    save_model(model)
    tokenizer = load_tokenizer(resolve_source(ModelConfig(str(model))))

    config = root / "config"
    config.mkdir()
    run: dict[str, dict[str, Any]] = {section: dict(values) for section, values in RUN.items()}
    run["model"]["name_or_path"], run["data"]["train"], run["output"]["dir"] = "some/model", "data.jsonl", "out"
    (config / "run.yaml").write_text(yaml.safe_dump(run))
    yield Target("configuration", config, "run.yaml", lambda path: load_config(path / "run.yaml"))

    yield Target("safetensors", model, "model.safetensors", _read_checkpoint)
    yield Target("config.json", model, "config.json", _read_checkpoint)
    yield Target(
        "tokenizer", model, "tokenizer.json", lambda path: load_tokenizer(resolve_source(ModelConfig(str(path))))
    )

    packed = root / "packed"
    assert convert(["to-4bit", str(model), "--out", str(packed)]) == 0
    yield Target("bitsandbytes header", packed, "model.safetensors", _read_checkpoint)
    yield Target("bitsandbytes state", packed, "model.safetensors", _read_checkpoint, inside=b"quant_type")

    gguf = root / "gguf"
    gguf.mkdir()
    slots = families.get("llama").slots(CONFIG)
    infos = {slot.name: TensorInfo(np.dtype(np.float32), slot.shape) for slot in slots}
    zeros = {name: np.full(info.shape, 0.1, np.float32) for name, info in infos.items()}
    write_gguf(gguf / "model.gguf", CONFIG, infos, zeros.__getitem__, tokenizer, file_type="F16")
    yield Target("GGUF", gguf, "model.gguf", _read_checkpoint)

    adapter = root / "adapter"
    adapter.mkdir()
    decoder = DecoderConfig.from_hf(CONFIG)
    lora = LoraConfig(r=4)
    save_peft_adapter(adapter, init_lora(lora, decoder), lora, resolve_source(ModelConfig(str(model))))
    for victim in ("adapter_config.json", "adapter_model.safetensors"):
        yield Target(f"PEFT {victim}", adapter, victim, load_peft_adapter)

    records = root / "records"
    records.mkdir()
    save_records(records / "train.jsonl", [question(thing) for thing in COLOURS])
    for policy in ("error", "skip"):
        yield Target(f"JSON Lines, {policy}", records, "train.jsonl", _reader_of_records(tokenizer, policy))
    parquet = root / "parquet"
    parquet.mkdir()
    datasets.Dataset.from_list([question(thing) for thing in COLOURS]).to_parquet(parquet / "train.parquet")
    yield Target("parquet", parquet, "train.parquet", _reader_of_records(tokenizer, "error", "train.parquet"))


def _read_checkpoint(path: Path) -> None:
    """A directory, or the GGUF file in it."""
    gguf = path / "model.gguf"
    checkpoint = open_checkpoint(gguf if gguf.is_file() else path)
    for load in checkpoint.loads:
        checkpoint.weight(load)
    if checkpoint.gguf is not None:
        checkpoint.gguf.build_tokenizer()


def _reader_of_records(tokenizer: Any, policy: Any, name: str = "train.jsonl") -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        config = DataConfig(str(path / name), max_length=64, overlong="truncate", on_bad_record=policy)
        return build(config, tokenizer)

    return read


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes."""
    for _ in range(rng.randint(1, 4)):
        # Headers and text stand in front: most changes go there.
        where = rng.randrange(max(1, len(content) if rng.random() < 0.3 else min(len(content), 4096)))
        length = rng.choice((1, 2, 4, 8, 32, 256))
        kind = rng.randrange(7)
        if kind == 0:
            content = content[:where] + bytes(rng.randrange(256) for _ in range(length)) + content[where + length :]
        elif kind == 1:
            content = content[:where] + content[where + length :]
        elif kind == 2:
            content = content[:where] + content[where : where + length] * rng.choice((2, 3, 50)) + content[where:]
        elif kind == 3:
            content = content[:where]
        elif kind == 4 and (numbers := list(re.finditer(rb"-?\d+(\.\d+)?", content[:8192]))):
            number = rng.choice(numbers)
            content = content[: number.start()] + rng.choice(EXTREMES) + content[number.end() :]
        elif kind == 5 and (words := list(re.finditer(rb"[A-Za-z_]{3,}", content[:8192]))):
            one, other = rng.choice(words), rng.choice(words)
            content = content[: one.start()] + other.group() + content[one.end() :]
        elif kind == 6:
            value = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
            content = content[:where] + value.to_bytes(8, "little") + content[where + 8 :]
    return content


def attempt(target: Target, directory: Path) -> str:
    """Read the damaged files; "taken", the name of our own error, or "FINDING" and what it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Of this process alone: the machine may be busy. The other one is for what waits.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(12 * SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(directory)
        outcome = "taken"
    except (UserError, ValueError, NotImplementedError) as error:
        own = isinstance(error, UserError) or type(error) in (ValueError, NotImplementedError)
        outcome = type(error).__name__ if own and str(error).strip() else "FINDING " + traceback.format_exc(limit=-4)
    except TooSlow:
        outcome = f"FINDING longer than {SECONDS} s of computation, or {12 * SECONDS} s"
    except Exception:  # noqa: BLE001  whatever nobody thought of is what is looked for
        outcome = "FINDING " + traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > MEMORY:
        outcome = f"FINDING {grown / 2**20:.0f} MiB more memory"
    return outcome


def _too_slow(*_: Any) -> None:
    raise TooSlow


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Damage the files that a user may bring.")
    parser.add_argument("--mutations", type=int, default=20000, help="of all kinds of files together")
    parser.add_argument("--only", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where files with findings go")
    options = parser.parse_args()
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _too_slow)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    rng, found = random.Random(options.seed), 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "good").mkdir()
        kinds = [kind for kind in targets(Path(name) / "good") if (options.only or "") in kind.name]
        for kind in kinds:
            outcomes = Counter[str]()
            content = (kind.directory / kind.victim).read_bytes()
            kind.read(kind.directory)
            for number in range(options.mutations // len(kinds)):
                # A fresh directory each time: readers keep caches by path.
                damaged = Path(name) / f"{kind.name}-{number}".replace(" ", "-")
                shutil.copytree(kind.directory, damaged)
                (damaged / kind.victim).write_bytes(kind.damaged(content, rng))
                outcome = attempt(kind, damaged)
                if outcome.startswith("FINDING"):
                    found += 1
                    options.keep.mkdir(parents=True, exist_ok=True)
                    kept = options.keep / f"{options.seed}-{damaged.name}-{kind.victim}"
                    shutil.copy(damaged / kind.victim, kept)
                    print(f"{kind.name}, mutation {number}, kept as {kept}: {outcome}", flush=True)
                outcomes[outcome.split()[0]] += 1
                shutil.rmtree(damaged)
            print(f"{kind.name}: {dict(outcomes)}", flush=True)
    print(f"{found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
