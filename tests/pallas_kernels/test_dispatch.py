from __future__ import annotations

import logging

import pytest

from pallas_kernels import _dispatch


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
