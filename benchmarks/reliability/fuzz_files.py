"""Damage the files that a user may bring, over and over, and see that each is answered with one of our own sentences.

    python benchmarks/reliability/fuzz_files.py --mutations 20000

Of each kind of file (configuration, safetensors and its index, bitsandbytes' states, GGUF, config.json, tokenizers and
their settings, chat templates, PEFT adapters, checkpoints of a run, JSON Lines, CSV, parquet) a good one is made. Every
mutation changes bytes, cuts, doubles or drops parts of it, or swaps numbers and words for extreme ones; of what holds
JSON or YAML every second one changes values, keys and nesting instead. A reader may take the file, or raise UserError,
ValueError or NotImplementedError, but none of ValueError's kinds, which Python's own parsers raise and which name no
file. Findings are anything else; more than five seconds of computation; more memory at any moment than twice the file
and an allowance for parsers; a file written elsewhere, a process started, a connection, or something unpickled. They
are printed, and the file kept in `--keep`. Exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import random
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

from fuzz_mutations import BY_SUFFIX, mutate  # noqa: E402
from runs import COLOURS, CONFIG, RUN, question, save_model, save_records  # noqa: E402

from convert import families  # noqa: E402
from convert.__main__ import main as convert  # noqa: E402
from convert.checkpoint import open_checkpoint  # noqa: E402
from convert.gguf.writer import write_gguf  # noqa: E402
from convert.safetensors_io import TensorInfo, open_model, write_model  # noqa: E402
from jaxtune.checkpoint import Checkpoints  # noqa: E402
from jaxtune.config import DataConfig, LoraConfig, ModelConfig  # noqa: E402
from jaxtune.config_io import load_config  # noqa: E402
from jaxtune.data.dataset import build  # noqa: E402
from jaxtune.errors import UserError  # noqa: E402
from jaxtune.export import load_peft_adapter, save_peft_adapter  # noqa: E402
from jaxtune.loading import load_tokenizer, resolve_source  # noqa: E402
from jaxtune.lora import init_lora  # noqa: E402
from jaxtune.metrics import host_peak_rss, host_rss  # noqa: E402
from jaxtune.models.config import DecoderConfig  # noqa: E402

SECONDS = 5
# Beside twice the file: what parsers and their pools take whatever they read.
ALLOWANCE = 48 * 2**20


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
            of_what_it_says = BY_SUFFIX.get(Path(self.victim).suffix)
            return of_what_it_says(content, rng) if of_what_it_says and rng.random() < 0.5 else mutate(content, rng)
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
    for victim in ("tokenizer.json", "tokenizer_config.json"):
        yield Target(victim, model, victim, _read_tokenizer)
    yield Target("chat template", model, "chat_template.jinja", _read_template)
    vocabulary = root / "vocabulary"
    shutil.copytree(model, vocabulary)
    state = json.loads((vocabulary / "tokenizer.json").read_text())["model"]
    (vocabulary / "tokenizer.json").unlink()
    (vocabulary / "vocab.json").write_text(json.dumps(state["vocab"]))
    (vocabulary / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    (vocabulary / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for victim in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        yield Target(f"vocabulary, {victim}", vocabulary, victim, _read_tokenizer)

    sharded = root / "sharded"
    shutil.copytree(model, sharded)
    whole = open_model(model)
    (sharded / "model.safetensors").unlink()
    write_model(sharded, whole.infos, whole.read, max_shard_bytes=100_000)
    yield Target("index", sharded, "model.safetensors.index.json", _read_checkpoint)

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
    rows = "".join(f"What is {thing}?,It is {colour}.\n" for thing, colour in COLOURS.items())
    (records / "train.csv").write_text("instruction,output\n" + rows)
    yield Target("CSV", records, "train.csv", _reader_of_records(tokenizer, "error", "train.csv"))
    parquet = root / "parquet"
    parquet.mkdir()
    datasets.Dataset.from_list([question(thing) for thing in COLOURS]).to_parquet(parquet / "train.parquet")
    yield Target("parquet", parquet, "train.parquet", _reader_of_records(tokenizer, "error", "train.parquet"))

    state = {"adapter": np.arange(5000, dtype=np.float32)}
    Checkpoints(root / "run").save(1, state, {"data_position": {}})
    files = [path for path in (root / "run" / "1").rglob("*") if path.is_file()]
    for victim in ("meta.json", str(max(files, key=lambda path: path.stat().st_size).relative_to(root / "run" / "1"))):
        yield Target("checkpoint", root / "run", f"1/{victim}", lambda path: Checkpoints(path).restore(1, state))


def _read_tokenizer(path: Path) -> Any:
    tokenizer = load_tokenizer(resolve_source(ModelConfig(str(path))))
    return tokenizer.decode(tokenizer("What colour is snow?")["input_ids"])


def _read_template(path: Path) -> Any:
    tokenizer = load_tokenizer(resolve_source(ModelConfig(str(path))))
    save_records(path / "train.jsonl", [question(thing) for thing in COLOURS])
    return build(DataConfig(str(path / "train.jsonl"), max_length=64, overlong="truncate"), tokenizer)


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


def attempt(target: Target, directory: Path) -> str:
    """Read the damaged files; "taken", the name of our own error, or "FINDING" and what it was."""
    size, before = (directory / target.victim).stat().st_size, _reset_peak()
    _seen.clear()
    _allowed[:] = [str(directory), *_caches]
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
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  whatever nobody thought of is what is looked for; panics of Rust are no Exception
        outcome = "FINDING " + traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        _allowed.clear()
    if _seen:
        outcome = f"FINDING {', '.join(_seen)}"
    elif (grown := host_peak_rss() - before) > 2 * size + ALLOWANCE:
        outcome = f"FINDING {grown / 2**20:.0f} MiB more memory for {size:,} bytes"
    return outcome


def attempt_once(target: Target, content: bytes, directory: Path) -> str:
    """`attempt` with this content, in a fresh directory, since readers keep caches by path."""
    shutil.copytree(target.directory, directory)
    (directory / target.victim).write_bytes(content)
    outcome = attempt(target, directory)
    shutil.rmtree(directory)
    return outcome


def kept(target: Target, content: bytes, directory: Path, name: str) -> Path:
    """Where a finding's file was put."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{target.name}-{target.victim}".replace(" ", "-").replace("/", "-")
    path.write_bytes(content)
    return path


# What a reader did that it should not; where it may write, empty while nothing is read.
_seen: list[str] = []
_allowed: list[str] = []
_caches: list[str] = []
_FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Python calls it for everything that it asks of the system."""
    if not _allowed:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {str(arguments)[:100]}")
    elif event == "open" and isinstance(arguments[0], str):
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not os.path.abspath(path).startswith((*_allowed, "/dev/null")):
            _seen.append(f"writes {path}")


def _reset_peak() -> int:
    """The kernel begins to look for this process's peak anew; returns what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return host_rss()


def _too_slow(*_: Any) -> None:
    raise TooSlow


def quiet() -> None:
    """No warnings, no logs; a reader that takes too long is stopped."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _too_slow)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def prepare(directory: Path) -> None:
    """A place for good files, and for what `datasets` keeps; from now on readers are watched."""
    (directory / "good").mkdir()
    datasets.config.HF_DATASETS_CACHE = directory / "datasets"
    _caches[:] = [str(directory / "datasets")]
    sys.addaudithook(_watch)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Damage the files that a user may bring.")
    parser.add_argument("--mutations", type=int, default=20000, help="of all kinds of files together")
    parser.add_argument("--only", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where files with findings go")
    options = parser.parse_args()
    quiet()
    rng, found = random.Random(options.seed), 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        kinds = [kind for kind in targets(Path(name) / "good") if (options.only or "") in kind.name]
        for kind in kinds:
            outcomes = Counter[str]()
            content = (kind.directory / kind.victim).read_bytes()
            kind.read(kind.directory)
            for number in range(options.mutations // len(kinds)):
                changed = kind.damaged(content, rng)
                outcome = attempt_once(kind, changed, Path(name) / f"{kind.name}-{number}".replace(" ", "-"))
                if outcome.startswith("FINDING"):
                    found += 1
                    file = kept(kind, changed, options.keep, f"{options.seed}-{number}")
                    print(f"{kind.name}, kept as {file}: {outcome}", flush=True)
                outcomes[outcome.split()[0]] += 1
            print(f"{kind.name}: {dict(outcomes)}", flush=True)
    print(f"{found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
