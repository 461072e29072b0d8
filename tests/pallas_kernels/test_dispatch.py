from __future__ import annotations

import logging

import jax
import pytest

from pallas_kernels import _device, _dispatch


def test_automatic_choice_takes_the_first_that_can_run_and_logs_why_once(caplog):
    candidates = {"triton": lambda: "no GPU", "mosaic": lambda: "no Hopper", "xla": lambda: None, "slow": lambda: None}
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert [_dispatch.choose("op_logged", None, candidates) for _ in range(3)] == ["xla"] * 3
    (record,) = caplog.records
    assert record.getMessage() == "op_logged: using 'xla' ('triton' cannot run: no GPU; 'mosaic' cannot run: no Hopper)"


def test_named_implementation_never_falls_back():
    candidates = {"triton": lambda: "no GPU", "xla": lambda: None}
    assert _dispatch.choose("op", "xla", candidates) == "xla"
    with pytest.raises(NotImplementedError, match=r"op: implementation 'triton' cannot run: no GPU"):
        _dispatch.choose("op", "triton", candidates)


def test_only_what_is_asked_is_checked():
    def must_not_be_asked():
        raise AssertionError

    assert _dispatch.choose("op", "xla", {"triton": must_not_be_asked, "xla": lambda: None}) == "xla"
    assert _dispatch.choose("op", None, {"xla": lambda: None, "slow": must_not_be_asked}) == "xla"


def test_unknown_name_and_nothing_usable():
    with pytest.raises(ValueError, match=r"op: unknown implementation 'cuda'; use one of 'triton', 'xla'"):
        _dispatch.choose("op", "cuda", {"triton": lambda: None, "xla": lambda: None})
    with pytest.raises(NotImplementedError, match=r"no implementation can run here .*no GPU.*no CPU"):
        _dispatch.choose("op", None, {"triton": lambda: "no GPU", "xla": lambda: "no CPU"})


def test_automatic_choices_are_recorded_each_time():
    candidates = {"triton": lambda: "no GPU", "xla": lambda: None}
    with _dispatch.record_choices() as choices:
        for _ in range(2):
            _dispatch.choose("op_recorded", None, candidates)
        _dispatch.choose("op_recorded", "xla", candidates)
    _dispatch.choose("op_recorded", None, candidates)
    assert choices == [_dispatch.Choice("op_recorded", "xla", (("triton", "no GPU"),))] * 2


def test_choices_can_be_recorded_without_tracing_them():
    with _dispatch.record_choices(trace_as="xla") as choices:
        assert _dispatch.choose("op", None, {"triton": lambda: None, "xla": lambda: None}) == "xla"
        assert _dispatch.choose("op_of_one", None, {"triton": lambda: None}) == "triton"
    assert [choice.implementation for choice in choices] == ["triton", "triton"]


@pytest.mark.parametrize("capability", [None, 7.5, 12.0])
def test_assumed_capability_holds_inside_and_traces_anew(capability):
    seen = []
    traced = jax.jit(lambda x: seen.append(_device.compute_capability()) or x)
    before = _device.compute_capability()
    traced(1.0)
    with _device.assume_capability(capability):
        traced(1.0)
    traced(1.0)
    assert seen == [before, capability, before]
