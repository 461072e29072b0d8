"""A run's share of a GPU, as options of JAX's client; the GPU itself is a stand-in for its driver's tool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtune import device_memory
from jaxtune.device_memory import check_limit, limit_memory
from jaxtune.errors import UserError

CARD_MIB = 24576
ALLOWANCE_MIB = 768


@pytest.fixture(autouse=True)
def _options_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.values["jax_pjrt_client_create_options"]
    jax.config.update("jax_pjrt_client_create_options", None)
    yield
    jax.config.update("jax_pjrt_client_create_options", before)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as nvidia-smi tells."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {CARD_MIB}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def options() -> Any:
    return jax.config.values["jax_pjrt_client_create_options"]


@pytest.mark.usefixtures("card")
def test_limit_is_the_share_of_the_card_less_what_cuda_takes() -> None:
    limit_memory("12GiB")
    assert options() == {"preallocate": False, "memory_fraction": (12 * 1024 - ALLOWANCE_MIB) / CARD_MIB}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("limit", ["25GiB", "1GiB"])
def test_limit_must_suit_the_card(limit: str) -> None:
    with pytest.raises(UserError, match=f"memory_limit is {limit}; this GPU has 24.00 GiB.*at least 1.50 GiB"):
        limit_memory(limit)


def test_without_a_limit_nearly_the_whole_card_as_it_is_needed() -> None:
    limit_memory(None)
    assert options() == {"preallocate": False, "memory_fraction": 0.95}


def test_what_the_user_has_set_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.3")
    limit_memory(None)
    assert options() == {}
    jax.config.update("jax_pjrt_client_create_options", "memory_fraction:0.2;x:1")
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    limit_memory(None)
    assert options() == {"memory_fraction": "0.2", "x": "1"}


@pytest.mark.usefixtures("card")
def test_limit_and_environment_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION is set as well"):
        limit_memory("12GiB")


def test_limit_that_nothing_enforces_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_limit(None)
    assert not caplog.records
    check_limit("12GiB")
    assert "what a cpu gives cannot be limited" in caplog.text


class Started:
    """A GPU whose allocator was made with another limit."""

    platform = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 13 * 2**30}


def test_limit_that_comes_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory.jax, "local_devices", lambda: [Started()])
    check_limit("13GiB")
    check_limit(None)
    with pytest.raises(UserError, match=r"JAX has started the GPU with 13\.00 GiB already"):
        check_limit("12GiB")


@pytest.mark.parametrize("text", ["12", "0GiB", "12 gigs", "-1GiB", "GiB"])
def test_limit_that_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"train\.memory_limit is .*; write a number and MiB, GiB, MB or GB"):
        device_memory.parse_bytes("train.memory_limit", text)
