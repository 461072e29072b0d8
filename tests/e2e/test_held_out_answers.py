"""A run that is asked to answers held-out questions, and writes how well."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Main, WriteRun

from jaxtune.metrics import read_metrics


def test_answers_get_better(write_run: WriteRun, tmp_path: Path, run_main: Main) -> None:
    pytest.importorskip("rouge_score", reason='pip install "jaxtune[rouge]"')
    train = {"max_steps": 30, "learning_rate": 0.02, "eval_steps": 15, "eval_answers": 3, "eval_answer_tokens": 12}
    status, err = run_main("--config", write_run(train=train))
    assert status == 0, err
    measured = [record for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "eval_rouge_l" in record]
    assert [record["step"] for record in measured] == [0, 15, 30]
    assert measured[0]["eval_rouge_l"] < 20
    assert measured[-1]["eval_rouge_l"] > 40
    assert all("eval_exact_match" in record for record in measured)
