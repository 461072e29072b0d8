"""Services that draw a run's numbers: what they are given, through stand-ins for their packages."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxtune.errors import UserError
from jaxtune.metrics import MetricsWriter
from jaxtune.trackers import open_trackers


class Calls(types.ModuleType):
    """A module whose functions, and whose objects' methods, write down how they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            return self

        return call


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    stand_ins = {name: Calls(name) for name in ("tensorboardX", "wandb", "trackio")}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_ins


def test_numbers_of_every_record_reach_every_service(tmp_path: Path, modules: dict[str, Calls]) -> None:
    run = tmp_path / "project" / "run"
    trackers = open_trackers(["tensorboard", "wandb", "trackio"], run, {"train": {"seed": 1}})
    with MetricsWriter(run / "metrics.jsonl", trackers=trackers) as metrics:
        metrics.write(0, sample="before", prompt="p")
        metrics.write(3, loss=2.0, eval_loss=math.nan, note="text", data=["words"])
    start, *logs, end = modules["tensorboardX"].calls
    assert start == ("SummaryWriter", (), {"logdir": str(run / "tensorboard")})
    scalars = [arguments for name, arguments, _ in logs if name == "add_scalar"]
    assert [(name, step) for name, _, step in scalars] == [("loss", 3), ("eval_loss", 3)]
    assert scalars[0][1] == 2.0
    assert math.isnan(scalars[1][1])
    assert end[0] == "close"
    for name in ("wandb", "trackio"):
        start, log, end = modules[name].calls
        assert start == ("init", (), {"project": "project", "name": "run", "config": {"train": {"seed": 1}}})
        assert log[0] == "log"
        assert log[1][0]["loss"] == 2.0
        assert set(log[1][0]) == {"loss", "eval_loss"}
        assert log[2] == {"step": 3}
        assert end == ("finish", (), {})


def test_service_without_its_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r'report_to names trackio.*pip install "jaxtune\[trackio\]"'):
        open_trackers(["trackio"], tmp_path, {})
