"""The bundled instruction set: what its README says of it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from transformers import PreTrainedTokenizerBase

from jaxtune.config import DataConfig
from jaxtune.data.dataset import build

HERE = pathlib.Path(__file__).parents[2] / "configs" / "data"
TRAIN, EVAL = (HERE / f"python_stdlib.{split}.jsonl" for split in ("train", "eval"))


def read(path: pathlib.Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_are_complete_and_splits_share_no_module() -> None:
    train, held_out = read(TRAIN), read(EVAL)
    assert (len(train), len(held_out)) == (1039, 122)
    for record in train + held_out:
        assert list(record) == ["instruction", "input", "output", "module"]
        assert all(value.strip() for value in record.values())
    assert not {record["module"] for record in train} & {record["module"] for record in held_out}
    pairs = [(record["instruction"], record["input"]) for record in train + held_out]
    assert len(set(pairs)) == len(pairs)
    assert TRAIN.stat().st_size + EVAL.stat().st_size < 1_000_000


def test_licence_goes_with_it() -> None:
    licence = (HERE / "LICENSE-PSF.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
    assert "All Rights Reserved" in licence


def test_documents_are_short(smollm2: PreTrainedTokenizerBase) -> None:
    for split in ("train", "eval"):
        config = DataConfig(train=str(TRAIN), eval=str(EVAL), max_length=480, packing=False)
        assert (build(config, smollm2, split).documents.lengths < 256).mean() > 0.98


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the records are those of Python 3.11.7")
def test_script_makes_the_same_files() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "make_python_stdlib.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
