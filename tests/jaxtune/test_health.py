"""The health check: what it says of this machine and of others, and that it fails where something is wrong."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import __main__ as command
from jaxtune import health
from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.devices import SHEETS, sheet, this_device
from jaxtune.generation_plan import plan_generation
from jaxtune.structure import compile_step
from pallas_kernels.nf4 import dequantize


def test_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert {"python", "jax", "numpy"} <= set(result["versions"])
    assert result["devices"]["devices"][0]["platform"] == "cpu"
    assert {choice["implementation"] for choice in result["implementations"]["ops"]} == {"xla"}
    assert result["a QLoRA step"]["error"] <= result["a QLoRA step"]["limit"] < 1e-4
    assert result["a Llama-3-8B step"]["policies"]["full"]["peak_bytes"] > 10 * 2**30


@pytest.mark.parametrize("name", ["jetson", "T4", "rtx 3090", "h200"])
def test_another_device_is_judged_from_its_data_sheet(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", name]) == 0
    out = capsys.readouterr().out
    assert f"[ ok ] data sheet\n       {sheet(name).kind}: " in out
    cudnn = "attention: cudnn" if (sheet(name).capability or 0.0) >= 8.0 else "needs compute capability 8.0 or newer"
    assert cudnn in out
    assert "estimated, not measured" in out
    assert "seconds = flops / (0.75 x data sheet's rate)" in out


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "rtx-4080"]) == 2
    assert ", ".join(SHEETS) in capsys.readouterr().err


def test_wrong_results_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "dequantize", lambda weight: 1.001 * np.asarray(dequantize(weight)))
    assert not health.check_step(this_device()).ok


def test_failure_is_told_and_has_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> health.Check:
        raise RuntimeError("no kernel\nstack")

    for name in ("check_implementations", "check_step"):
        monkeypatch.setattr(health, name, broken)
    assert command.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "[FAIL] a QLoRA step\n       RuntimeError: no kernel\n" in out
    assert out.endswith("Failed: implementations, a QLoRA step\n")


def test_gpu_that_jax_does_not_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "nvidia_smi", lambda field: "NVIDIA H200")
    check = health.check_devices()
    assert not check.ok
    assert "install jaxtune[cuda13]" in check.lines[-1]


@pytest.mark.parametrize(
    ("head", "on_host", "prompt", "compiled", "rate"),
    [("dtype", False, 2048, 5.75, 1013.6), ("nf4", False, 2048, 5.024, 1213.4), ("nf4", True, 448, 3.858, 1213.4)],
)
def test_generation_is_planned_as_it_is_compiled(
    head: Any, on_host: bool, prompt: int, compiled: float, rate: float
) -> None:
    """GiB that XLA's programs for an H200 hold, and the rate that its bandwidth allows."""
    model = ModelConfig("-", head=head, embedding_on_host=on_host)
    plan = plan_generation(health.LLAMA_3_8B, model, LoraConfig(r=16), jnp.bfloat16, prompt=prompt, new=64)
    assert abs(plan.peak / 2**30 - compiled) < 0.01
    assert round(plan.most_tokens_per_second(sheet("h200")), 1) == rate


def test_the_timed_step_of_a_gpu_gives_numbers() -> None:
    """Step after step, from the state that it starts with."""
    config, dtype = health.qlora_run(1, 64), jnp.dtype(jnp.float32)
    losses, seconds = health.timed_steps(
        compile_step(config, health._SMALL, dtype, "full"), config, health._SMALL, dtype
    )
    assert (len(losses), bool(np.isfinite(losses).all()), seconds > 0) == (5, True, True)
    assert losses[-1] < losses[0]
