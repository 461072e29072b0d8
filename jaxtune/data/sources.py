"""Reading records: local files, directories saved by `datasets`, hub datasets; and which form their columns have."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Literal

import datasets

from jaxtune.config import DataConfig
from jaxtune.errors import UserError

Form = Literal["instruction", "messages", "text"]

# `datasets`' builder for each extension. A text file gives one record per line, in the column `text`.
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def load_records(path_or_id: str, split: str) -> datasets.Dataset:
    """One split of a local file, of a directory written by `save_to_disk`, or of a hub dataset.

    A path that exists is read from disk and asks no server. A single file has one split, `train`; `split` may cut it in
    `datasets`' own notation (`train[:90%]`). Blank lines of a text file are no records.

    Raises:
        UserError: nothing there, unreadable, unknown extension or split, or no records.
    """
    path = pathlib.Path(path_or_id).expanduser()
    if path.is_dir():
        records = _load_directory(path, split)
    elif path.is_file():
        records = _load_file(path, split)
    elif path.suffix.lower() in BUILDERS or path_or_id.startswith((".", "~", "/")) or len(path.parts) > 2:
        raise UserError(
            f"data file {path_or_id} does not exist; correct the path (relative ones start at {path.cwd()})"
        )
    else:
        records = _load(path_or_id, f"hub dataset {path_or_id}", split)
    if len(records) == 0:
        raise UserError(f"{path_or_id} has no records in split {split!r}; at least one is needed")
    return records.with_format(None)


def detect_form(columns: Sequence[str], config: DataConfig, name: str) -> Form:
    """The form stated in `config.form`, or the one form whose columns are all there.

    instruction needs `instruction` and `output` (`input` is optional), messages needs `messages`, text needs
    `config.text_field`. name: the data's, for errors.

    Raises:
        UserError: a column of the stated form is missing; no form fits, or more than one.
    """
    needed: dict[Form, set[str]] = {
        "instruction": {"instruction", "output"},
        "messages": {"messages"},
        "text": {config.text_field},
    }
    found = f"{name} has the columns {', '.join(columns)}"
    if config.form != "auto":
        if missing := needed[config.form] - set(columns):
            raise UserError(
                f"{found}; data.form {config.form} also needs {', '.join(sorted(missing))}: rename a column, or set "
                "data.form (and for text data.text_field) to what is there"
            )
        return config.form
    fitting = [form for form, names in needed.items() if names <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{found}, which fit more than one form; set data.form to one of {', '.join(fitting)}")
    rules = "; ".join(f"{form} needs {' and '.join(sorted(names))}" for form, names in needed.items())
    raise UserError(f"{found}, which fit no form ({rules}); rename the columns, or set data.text_field")


def _load_file(path: pathlib.Path, split: str) -> datasets.Dataset:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise UserError(f"data file {path} has an unknown extension; use one of {', '.join(BUILDERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"data file {path} is empty; at least one record is needed")
    records = _load(builder, str(path), split, data_files=str(path))
    return records.filter(lambda record: record["text"].strip() != "") if builder == "text" else records


def _load_directory(path: pathlib.Path, split: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(f"directory {path} was not written by datasets' save_to_disk; name a file inside it") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise UserError(f"directory {path} has the splits {', '.join(splits)}, not {split!r}; choose one of them")
    return splits[split]


def _load(builder: str, name: str, split: str, **options: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise UserError(
            f"{name} could not be read, split {split!r}: {reason}; correct the name, split or file"
        ) from error
