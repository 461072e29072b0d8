"""Reading local data: every format, no network, and an error that helps for every mistake."""

from __future__ import annotations

import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from jaxtune.config import DataConfig
from jaxtune.data.forms import detect_form
from jaxtune.data.sources import Unreadable, from_memory, open_records
from jaxtune.errors import UserError

RECORDS = [{"instruction": f"add {i}", "input": None, "output": f"déjà {i}\n"} for i in range(7)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a local path must not reach for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def read(path: object, split: str = "train") -> list[Any]:
    return list(open_records(str(path), split))


def without_nulls(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if value is not None} for record in records]


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet", "csv"])
def test_files_of_every_format_give_the_records(tmp_path: pathlib.Path, extension: str) -> None:
    path = tmp_path / f"data.{extension}"
    made = datasets.Dataset.from_list(RECORDS)
    if extension == "json":
        made.to_json(path, lines=False)
    else:
        getattr(made, {"jsonl": "to_json", "parquet": "to_parquet", "csv": "to_csv"}[extension])(path)
    # A null of Arrow's says that a record lacks the field; a cell of a CSV file holds a text, if an empty one.
    expected = {"parquet": without_nulls(RECORDS), "csv": [record | {"input": ""} for record in RECORDS]}
    expected_here = expected.get(extension, RECORDS)
    assert read(path) == expected_here
    assert read(path, "train[:3]") == expected_here[:3]
    assert read(path, "train[-2:]") == expected_here[-2:]
    assert read(path, "train[50%:]") == expected_here[4:]
    assert open_records(str(path)).columns == ("instruction", "input", "output")


def test_values_are_as_the_file_has_them(tmp_path: pathlib.Path) -> None:
    """Texts that other readers take for nulls, and objects whose fields differ from record to record."""
    path = tmp_path / "data.csv"
    path.write_text("instruction,input,output\nNA,None,null\n1,2.50,007\n", encoding="utf-8")
    assert [list(record.values()) for record in read(path)] == [["NA", "None", "null"], ["1", "2.50", "007"]]
    (tmp_path / "data.tsv").write_text("text\tn\na, b\t1\n", encoding="utf-8")
    assert read(tmp_path / "data.tsv") == [{"text": "a, b", "n": "1"}]
    records = [{"tools": [{"a": 1}]}, {"tools": [{"b": None}, "c"]}, {"tools": "d"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8-sig")
    assert read(path) == records


@pytest.mark.parametrize("name", ["a[1].csv", "b*?.parquet", "c{d,e}.jsonl", "f::g.json", "sub[x]/h.csv"])
def test_odd_names_of_files(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    made = datasets.Dataset.from_list([{"text": "a"}])
    plain = tmp_path / f"plain{path.suffix}"
    getattr(made, {".csv": "to_csv", ".parquet": "to_parquet"}.get(path.suffix, "to_json"))(plain)
    plain.rename(path)
    assert read(path) == [{"text": "a"}]


def test_text_file_gives_its_lines_that_are_not_blank(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("one\n\n  \n two\r\nthree", encoding="utf-8")
    assert [record["text"] for record in read(path)] == ["one", " two", "three"]


def test_saved_directories(tmp_path: pathlib.Path) -> None:
    made = datasets.Dataset.from_list(RECORDS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(a=made, b=made.select([2])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == without_nulls(RECORDS)
    assert read(tmp_path / "two", "b") == without_nulls(RECORDS[2:3])
    assert read(tmp_path / "two", "a[2:4]") == without_nulls(RECORDS[2:4])
    with pytest.raises(UserError, match=r"two has no split 'train'; choose from a, b"):
        read(tmp_path / "two")


def test_records_in_memory() -> None:
    made = datasets.Dataset.from_list(RECORDS)
    assert list(from_memory(made)) == without_nulls(RECORDS)
    assert list(from_memory(made.to_iterable_dataset())) == without_nulls(RECORDS)
    again = from_memory(RECORDS)
    assert list(again) == list(again) == RECORDS
    assert isinstance(list(from_memory([{"a": 1}, "b"]))[1], Unreadable)  # type: ignore[list-item]
    with pytest.raises(UserError, match="have the splits a; give one of them"):
        from_memory(datasets.DatasetDict(a=made))
    with pytest.raises(UserError, match="are none"):
        from_memory([])


def test_what_cannot_be_read_is_named(tmp_path: pathlib.Path, write_jsonl: Callable[..., str]) -> None:
    (tmp_path / "data.xml").write_text("<a/>")
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "null.json").write_text("null")
    (tmp_path / "one.json").write_text('{\n  "data": [{"text": "a"}]\n}')
    (tmp_path / "latin.json").write_bytes('[{"text": "é"}]'.encode("latin-1"))
    (tmp_path / "wide.jsonl").write_text('{"text": "a"}', encoding="utf-16")
    (tmp_path / "wider.jsonl").write_bytes('{"text": "a"}'.encode("utf-16-le"))
    (tmp_path / "only.csv").write_text("a,b\n")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "latin.csv").write_text("a,é", encoding="latin-1")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "a::b.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.parquet").write_text("")
    good = write_jsonl(RECORDS)
    for path, split, message in [
        (tmp_path / "absent.jsonl", "train", r"absent\.jsonl does not exist"),
        ("absent/deep/file", "train", r"absent/deep/file does not exist"),
        (tmp_path / "data.xml", "train", r"data\.xml has an unknown extension; use one of .*\.parquet"),
        (tmp_path / "nothing.jsonl", "train", r"nothing\.jsonl is empty"),
        (tmp_path / "blank.txt", "train", r"blank\.txt has no records"),
        (tmp_path / "list.json", "train", r"list\.json has no records"),
        (tmp_path / "null.json", "train", r"null\.json begins with 'null'; it must hold a list"),
        (tmp_path / "one.json", "train", r"one\.json holds one object over several lines; put the records in a list"),
        (tmp_path / "latin.json", "train", r"latin\.json is not UTF-8 \(byte 0xe9 at 11\)"),
        (tmp_path / "wide.jsonl", "train", r"wide\.jsonl is no UTF-8 text, but UTF-16.*; save it as UTF-8"),
        (tmp_path / "wider.jsonl", "train", r"wider\.jsonl is no UTF-8 text, but UTF-16.*; save it as UTF-8"),
        (tmp_path / "only.csv", "train", r"only\.csv has a header and no record"),
        (tmp_path / "pipe.jsonl", "train", r"pipe\.jsonl is no regular file"),
        (tmp_path / "latin.csv", "train", r"latin\.csv is not UTF-8 \(byte 0xe9 in its header\)"),
        (tmp_path / "ragged.csv", "train", r"ragged\.csv could not be read: .*Expected 2 fields in line 3"),
        (tmp_path / "a::b.csv", "train", r"has :: in its path"),
        (tmp_path / "empty.parquet", "train", r"empty\.parquet is empty"),
        (tmp_path, "train", r"holds nothing that datasets' save_to_disk wrote"),
        (good, "test", r"has no split 'test'; choose from train"),
        (good, "train[:0]", r"has no records in split 'train\[:0\]'"),
        (good, "train[", r"the split 'train\[' cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            read(path, split)


def test_broken_records_are_told_apart_from_good_ones(tmp_path: pathlib.Path) -> None:
    good = b'{"text": "a"}\n'
    deep = b"[" * 100_000 + b"]" * 100_000 + b"\n"
    path = tmp_path / "broken.jsonl"
    path.write_bytes(good + '{"text": "é"}\n'.encode("latin-1") + b'{"text": "b", \n' + deep + b"[1]\n" + good)
    found = read(path)
    reasons = [record.reason for record in found if isinstance(record, Unreadable)]
    assert [isinstance(record, Unreadable) for record in found] == [False, True, True, True, True, False]
    for reason, said in zip(reasons, ["line 2 is not UTF-8", "line 3 is no valid JSON", "line 4 is no", "an object"]):
        assert said in reason
    path.write_bytes(b'{"text": "a", \n')
    with pytest.raises(UserError, match=r"broken\.jsonl, record 1: line 1 is no valid JSON .*; correct or remove it"):
        read(path)
    # A list cut short: what stands before is read.
    path = tmp_path / "broken.json"
    path.write_text('[{"text": "a"}, {"text": "b"}, {"te')
    assert [isinstance(record, Unreadable) for record in read(path)] == [False, False, True]


def test_progress_bars_stay_as_they_were(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\na\n")
    assert not datasets.are_progress_bars_disabled()
    read(path)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""


def test_hub_failures_are_the_users_to_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def offline(name: str, /, **options: Any) -> None:
        asked.update(options, id=name)
        raise ConnectionError("the hub is out of reach")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"hub dataset someone/something:part, .*could not be read.*out of reach"):
        read("someone/something:part", "test[:5%]")
    assert asked == {"id": "someone/something", "name": "part", "split": "test[:5%]"}


@pytest.mark.parametrize(
    ("columns", "settings", "form"),
    [
        (["instruction", "input", "output"], {}, "instruction"),
        (["output", "instruction"], {}, "instruction"),
        (["messages", "id"], {}, "messages"),
        (["text"], {}, "text"),
        (["body", "text"], {"text_field": "body"}, "text"),
        (["messages", "text"], {"form": "text"}, "text"),
        (["messages", "label"], {"form": "messages"}, "messages"),
        (["conversations", "tools"], {}, "sharegpt"),
        (["prompt", "completion"], {}, "completion"),
        (["input_ids", "labels", "attention_mask"], {}, "tokens"),
        (["question", "answer", "text"], {"response_format": "{answer}"}, "format"),
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
        (["question"], {"response_format": "{answer}"}, r"data\.form format also needs answer"),
        (["prompt", "chosen", "rejected"], {}, r"chosen are pairs of a better and a worse answer.*state data\.form"),
        (["messages", "label"], {}, r"label may mark answers to avoid"),
        (["messages", "images"], {}, r"images are pictures"),
        (["instruction"], {"form": "instruction"}, r"also needs output"),
        (["body"], {"form": "text"}, r"also needs text"),
    ],
)
def test_columns_that_do_not_settle_the_form_are_listed(
    columns: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        detect_form(columns, DataConfig(train="x", **settings), "x")


def test_streams_are_read_no_further_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    read_so_far: list[int] = []

    def records() -> Iterator[dict[str, int]]:
        for number in range(100):
            read_so_far.append(number)
            yield {"text": number}

    def load(path: str, **options: Any) -> datasets.IterableDataset:
        assert (path, options) == ("owner/name", {"split": "train", "streaming": True, "name": "part"})
        return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = open_records("owner/name:part", "train[2:5]", streaming=True)
    assert list(found) == [{"text": 2}, {"text": 3}, {"text": 4}]
    assert max(read_so_far) < 10
    assert len(list(open_records("owner/name:part", streaming=True))) == 100
    for split in ("train[:10%]", "train[-3:]", "train["):
        with pytest.raises(UserError, match="a stream can be cut by numbers of records alone"):
            open_records("owner/name:part", split, streaming=True)


def test_parquet_with_text_that_is_no_utf8(tmp_path: pathlib.Path) -> None:
    """Arrow reads such a file; the text fails when it is taken out."""
    offsets, text = (pa.py_buffer(part) for part in (np.array([0, 2], np.int32).tobytes(), b"a\xff"))
    column = pa.StringArray.from_buffers(1, offsets, text)
    parquet.write_table(pa.table({"text": column}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad.parquet: records 1 to 1 cannot be read: .*; the file is damaged"):
        open_records(str(tmp_path / "bad.parquet"))
