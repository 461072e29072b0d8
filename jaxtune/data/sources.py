"""Reading records: local files, directories saved by `datasets`, hub datasets, and records in memory.

JSON, JSONL and text are read record by record, so that a broken one is named and can be passed over, values keep the
types that they have in the file, and a file need not fit into memory. `datasets` reads all else.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import glob
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets

from jaxtune.errors import UserError, shown

Record = dict[str, Any]

LINES = {".jsonl": "json", ".json": "json", ".txt": "text"}
# `datasets`' builder for the others.
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
EXTENSIONS = [*LINES, *BUILDERS]

_CHUNK = 1000
_ONE_OBJECT = 2**24  # bytes of a file that may be one record by mistake
_SAMPLED = 100  # records that show the columns of a file without a schema
_STREAMED = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>\d+)?:(?P<stop>\d+)?\])?")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """In the place of a record that could not be read: what is wrong with it, and what to do."""

    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """The records of one split, read anew by each iteration.

    name: for messages. columns: names in the schema, or in the first records.
    """

    name: str
    columns: tuple[str, ...]
    iterate: Callable[[], Iterator[Record | Unreadable]]

    def __iter__(self) -> Iterator[Record | Unreadable]:
        return self.iterate()


def open_records(path_or_id: str, split: str = "train", *, streaming: bool = False) -> Records:
    """One split of a local file, of a directory written by `save_to_disk`, or of a hub dataset (`name` or
    `name:subset`).

    A path that exists is read from disk and asks no server. A single file has one split, `train`; `split` may cut it
    (`train[:90%]`, `train[-100:]`). Blank lines are no records. streaming: take a hub dataset as it is read, without a
    copy on the disk; it may be cut by numbers of records alone (`train[:10000]`), and is read no further.

    Raises:
        UserError: nothing there, unreadable, unknown extension or split, or no records.
    """
    if "\0" in path_or_id:
        raise UserError(f"{path_or_id!r} holds a NUL character; correct the name")
    path = pathlib.Path(path_or_id).expanduser()
    extension = path.suffix.lower()
    if path.is_dir():
        records = _from_datasets(path_or_id, _load_directory(path), split)
    elif path.is_file() and extension in LINES:
        records = _from_lines(path, LINES[extension], split)
    elif path.is_file() and extension in BUILDERS:
        records = _from_datasets(path_or_id, {"train": _load_file(path)}, split)
    elif path.exists() and not path.is_file():
        raise UserError(f"data file {path} is no regular file; copy what it gives into one")
    elif path.exists():
        raise UserError(f"data file {path} has an unknown extension; use one of {', '.join(EXTENSIONS)}")
    elif extension in EXTENSIONS or path_or_id.startswith((".", "~", "/")) or len(path.parts) > 2:
        raise UserError(
            f"data file {path_or_id} does not exist; correct the path (relative ones start at {path.cwd()})"
        )
    else:
        records = _of_dataset(path_or_id, _from_hub(path_or_id, split, streaming))
    return _with_records(records, f"{path_or_id} has no records in split {split!r}")


def from_memory(records: datasets.Dataset | datasets.IterableDataset | Sequence[Mapping[str, Any]]) -> Records:
    """Records that a program has already."""
    name = "the records given"
    if isinstance(records, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError(f"{name} have the splits {', '.join(records)}; give one of them")
    if isinstance(records, datasets.Dataset | datasets.IterableDataset):
        found = _of_dataset(name, records)
    else:
        items = list(records)

        def iterate() -> Iterator[Record | Unreadable]:
            return (dict(item) if isinstance(item, Mapping) else _no_object(item) for item in items)

        found = Records(name, _columns(iterate()), iterate)
    return _with_records(found, f"{name} are none")


def _with_records(records: Records, otherwise: str) -> Records:
    """The records, of which at least one can be read."""
    first = next(iter(records), None)
    if first is None:
        raise UserError(f"{otherwise}; at least one is needed")
    if isinstance(first, Unreadable) and all(isinstance(record, Unreadable) for record in records):
        raise UserError(f"{records.name}, record 1: {first.reason}; no other record can be read either")
    return records


def _from_lines(path: pathlib.Path, kind: str, split: str) -> Records:
    name = str(path)
    whole = _open_json(path) if kind == "json" else lambda: _text_lines(path)
    _, start, stop = _cut(name, split, {"train": lambda: sum(1 for _ in whole())})

    def iterate() -> Iterator[Record | Unreadable]:
        return itertools.islice(whole(), start, stop)

    return Records(name, _columns(iterate()), iterate)


def _columns(records: Iterable[Record | Unreadable]) -> tuple[str, ...]:
    readable = (record for record in records if not isinstance(record, Unreadable))
    return tuple(dict.fromkeys(key for record in itertools.islice(readable, _SAMPLED) for key in record))


def _open_json(path: pathlib.Path) -> Callable[[], Iterator[Record | Unreadable]]:
    """How to iterate over a list of objects, or over an object in each line."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise UserError(f"data file {path} is empty; at least one record is needed")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise UserError(f"data file {path} is no UTF-8 text, but UTF-16, UTF-32 or binary; save it as UTF-8")
    if head[:1] == b"[":
        records = list(_json_list(path))
        return lambda: iter(records)
    if head[:1] != b"{":
        raise UserError(
            f"data file {path} begins with {shown(head[:20].decode('utf-8', 'replace'))}; it must hold a list of "
            "records [{...}, ...], or a record {...} in each line"
        )
    first = next(_json_lines(path))
    if isinstance(first, Unreadable) and path.stat().st_size < _ONE_OBJECT and _is_one_object(path):
        raise UserError(f"data file {path} holds one object over several lines; put the records in a list [{{...}}]")
    return lambda: _json_lines(path)


def _is_one_object(path: pathlib.Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes(), object_pairs_hook=_object), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: pathlib.Path) -> Iterator[Record | Unreadable]:
    for number, line in _lines(path):
        yield _parse(line, f"line {number} ")


def _text_lines(path: pathlib.Path) -> Iterator[Record | Unreadable]:
    for number, line in _lines(path):
        try:
            yield {"text": line.decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield _no_utf8(error, f"line {number} ")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _parse(line: bytes, place: str) -> Record | Unreadable:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return _no_utf8(error, place)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"{place}is no valid JSON ({error}); correct or remove it")
    return record if isinstance(record, dict) else _no_object(record)


def _object(fields: list[tuple[str, Any]]) -> Record:
    """A JSON object, in which of two fields of one name the first would be lost."""
    record = dict(fields)
    if len(record) < len(fields):
        names = [name for name, _ in fields]
        raise ValueError(f"the field {shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return record


def _no_utf8(error: UnicodeDecodeError, place: str) -> Unreadable:
    byte = error.object[error.start]
    return Unreadable(f"{place}is not UTF-8 (byte 0x{byte:02x} at {error.start}); save the file in that encoding")


def _no_object(value: object) -> Unreadable:
    return Unreadable(f"it must be an object with named fields, not {shown(value)}; correct or remove it")


def _json_list(path: pathlib.Path) -> Iterator[Record | Unreadable]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} {_no_utf8(error, '').reason}") from error
    try:
        items = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        items = _json_items(text)
    for item in items:
        yield item if isinstance(item, dict | Unreadable) else _no_object(item)


def _json_items(text: str) -> Iterator[Any]:
    """The items of a broken list up to the fault."""
    decoder, blank = json.JSONDecoder(object_pairs_hook=_object), re.compile(r"[\s,]*")
    at = text.index("[") + 1
    while True:
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield Unreadable(f"the file is no valid JSON from here on ({error}); correct it")
            return
        yield item


def _of_dataset(name: str, loaded: datasets.Dataset | datasets.IterableDataset) -> Records:
    loaded = loaded.with_format(None)

    def chunks() -> Iterator[list[Record]]:
        if isinstance(loaded, datasets.IterableDataset):
            yield from ([record] for record in loaded)
        else:
            for start in range(0, len(loaded), _CHUNK):
                end = min(start + _CHUNK, len(loaded))
                try:
                    records = loaded.select(range(start, end)).to_list()
                except ValueError as error:  # Text that is no UTF-8 shows only now.
                    raise UserError(
                        f"{name}: records {start + 1} to {end} cannot be read: {error}; the file is damaged, fetch or "
                        "write it again"
                    ) from error
                yield records

    def iterate() -> Iterator[Record | Unreadable]:
        return (_without_nulls(record) for chunk in chunks() for record in chunk)

    return Records(name, tuple(loaded.column_names or _columns(iterate())), iterate)


def _from_hub(path_or_id: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    name, _, subset = path_or_id.partition(":")
    options: dict[str, Any] = {"name": subset} if subset else {}
    what = f"hub dataset {path_or_id}, split {split!r}"
    if not streaming:
        return _load(name, what, split=split, **options)
    match = _STREAMED.fullmatch(split)
    if match is None:
        raise UserError(f"{what}: a stream can be cut by numbers of records alone; write train or train[:10000]")
    loaded = _load(name, what, split=match["name"], streaming=True, **options).skip(int(match["start"] or 0))
    return loaded.take(int(match["stop"]) - int(match["start"] or 0)) if match["stop"] else loaded


def _from_datasets(name: str, splits: Mapping[str, datasets.Dataset], split: str) -> Records:
    key, start, stop = _cut(name, split, {key: part.__len__ for key, part in splits.items()})
    part = splits[key]
    return _of_dataset(name, part.select(range(start, len(part) if stop is None else stop)))


def _cut(name: str, split: str, counts: Mapping[str, Callable[[], int]]) -> tuple[str, int, int | None]:
    """The split that `split` names, and from where to where it goes; a stop of None is its end."""
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UserError(f"{name}: the split {split!r} cannot be read; write train, train[:90%] or train[100:]")
    if match["name"] not in counts:
        raise UserError(f"{name} has no split {match['name']!r}; choose from {', '.join(counts)}")
    if match["start"] is None and match["stop"] is None:
        return match["name"], 0, None
    count = counts[match["name"]]()

    def place(text: str | None, otherwise: int) -> int:
        if text is None:
            return otherwise
        value = round(int(text[:-1]) / 100 * count) if text.endswith("%") else int(text)
        return min(max(value + count if text.startswith("-") else value, 0), count)

    start, stop = place(match["start"], 0), place(match["stop"], count)
    return match["name"], start, max(start, stop)


def _without_nulls(value: Any) -> Any:
    """Arrow holds a null wherever a record lacks a field that others have; in its own words it has no such field."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _load_file(path: pathlib.Path) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise UserError(f"data file {path} is empty; at least one record is needed")
    if "::" in str(path):
        raise UserError(f"data file {path} has :: in its path, which `datasets` takes for a chain of files; rename it")
    builder = BUILDERS[path.suffix.lower()]
    options = _cells(path) if builder == "csv" else {}
    return _load(builder, f"data file {path}", split="train", data_files=glob.escape(str(path)), **options)


def _cells(path: pathlib.Path) -> dict[str, Any]:
    """Options by which every cell is a text, and NA and null are words like any others."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = (row for row in csv.reader(file, delimiter=separator) if row)
            header, first = next(rows), next(rows, None)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"data file {path} is not UTF-8 (byte 0x{byte:02x} in its header); save it so") from error
    except (StopIteration, csv.Error) as error:
        raise UserError(f"data file {path} has no header that can be read ({error}); correct it") from error
    if first is None:
        raise UserError(f"data file {path} has a header and no record; at least one is needed")
    if len(set(header)) < len(header):
        raise UserError(f"data file {path} has two columns of one name ({', '.join(header)}); rename one of them")
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _load_directory(path: pathlib.Path) -> Mapping[str, datasets.Dataset]:
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"directory {path} holds nothing that datasets' save_to_disk wrote and that can be read ({error}); name a "
            "file inside it"
        ) from error
    return saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}


def _load(builder: str, what: str, **options: Any) -> Any:
    with _quiet():
        try:
            return datasets.load_dataset(builder, **options)
        except (OSError, ValueError, StopIteration, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error.__cause__ or error).strip()
            raise UserError(f"{what} could not be read: {reason}; correct the name, split or file") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without `datasets`' progress bars, whose place is a terminal, and without its log of what is raised as well; both
    are as before afterwards."""
    shown_before, level = datasets.are_progress_bars_disabled() is False, datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown_before:
            datasets.enable_progress_bars()
