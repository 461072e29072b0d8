"""Reading local data: every format, no network, and an error that helps for every mistake."""

from __future__ import annotations

import pathlib
import socket
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from jaxtune.config import DataConfig
from jaxtune.data.sources import detect_form, load_records
from jaxtune.errors import UserError

RECORDS = [{"instruction": f"add {i}", "input": None, "output": f"déjà {i}\n"} for i in range(7)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a local path must not reach for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet", "csv"])
def test_files_of_every_format_give_the_records(tmp_path: pathlib.Path, extension: str) -> None:
    path = tmp_path / f"data.{extension}"
    made = datasets.Dataset.from_list(RECORDS)
    if extension == "json":
        made.to_json(path, lines=False)
    else:
        getattr(made, {"jsonl": "to_json", "parquet": "to_parquet", "csv": "to_csv"}[extension])(path)
    assert load_records(str(path), "train").to_list() == RECORDS
    assert len(load_records(str(path), "train[:3]")) == 3


def test_text_file_gives_its_lines_that_are_not_blank(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("one\n\n  \n two\n", encoding="utf-8")
    assert load_records(str(path), "train")["text"][:] == ["one", " two"]


def test_saved_directories(tmp_path: pathlib.Path) -> None:
    made = datasets.Dataset.from_list(RECORDS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(a=made, b=made.select([2])).save_to_disk(tmp_path / "two")
    assert load_records(str(tmp_path / "one"), "train").to_list() == RECORDS
    assert load_records(str(tmp_path / "two"), "b").to_list() == RECORDS[2:3]
    with pytest.raises(UserError, match=r"two has the splits a, b, not 'train'"):
        load_records(str(tmp_path / "two"), "train")


def test_what_cannot_be_read_is_named(tmp_path: pathlib.Path, write_jsonl: Callable[..., str]) -> None:
    (tmp_path / "data.xml").write_text("<a/>")
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    good = write_jsonl(RECORDS)
    for path, split, message in [
        (tmp_path / "absent.jsonl", "train", r"absent\.jsonl does not exist"),
        ("absent/deep/file", "train", r"absent/deep/file does not exist"),
        (tmp_path / "data.xml", "train", r"data\.xml has an unknown extension; use one of .*\.parquet"),
        (tmp_path / "nothing.jsonl", "train", r"nothing\.jsonl is empty"),
        (tmp_path / "blank.txt", "train", r"blank\.txt has no records"),
        (tmp_path / "list.json", "train", r"list\.json"),
        (tmp_path / "broken.jsonl", "train", r"broken\.jsonl could not be read"),
        (tmp_path, "train", r"was not written by datasets' save_to_disk"),
        (good, "test", r"data\.jsonl could not be read, split 'test'"),
        (good, "train[:0]", r"no data"),
    ]:
        with pytest.raises(UserError, match=message):
            load_records(str(path), split)


def test_hub_failures_are_the_users_to_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("the hub is out of reach")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"hub dataset someone/something could not be read.*out of reach"):
        load_records("someone/something", "train")


@pytest.mark.parametrize(
    ("columns", "settings", "form"),
    [
        (["instruction", "input", "output"], {}, "instruction"),
        (["output", "instruction"], {}, "instruction"),
        (["messages", "id"], {}, "messages"),
        (["text"], {}, "text"),
        (["body", "text"], {"text_field": "body"}, "text"),
        (["messages", "text"], {"form": "text"}, "text"),
    ],
)
def test_form_follows_from_the_columns(columns: list[str], settings: dict[str, Any], form: str) -> None:
    assert detect_form(columns, DataConfig(train="x", **settings), "x") == form


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            ["instruction", "output", "text"],
            {},
            r"instruction, output, text, which fit more than one form; set data\.form",
        ),
        (["prompt", "answer"], {}, r"prompt, answer, which fit no form"),
        (["conversations"], {"form": "messages"}, r"data\.form messages also needs messages"),
        (["instruction"], {"form": "instruction"}, r"also needs output"),
        (["body"], {"form": "text"}, r"also needs text"),
    ],
)
def test_columns_that_do_not_settle_the_form_are_listed(
    columns: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        detect_form(columns, DataConfig(train="x", **settings), "x")
