"""Configuration files: reading with overrides, writing, comparing. Imports neither JAX nor any data library."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxtune.config import RunConfig
from jaxtune.config_checks import nearest
from jaxtune.errors import UserError, shown

DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow")
MODEL_SUFFIXES = (".gguf",)

# What a run's numbers do not depend on, beside the sections output and mesh: what is reported, where from, and how the
# same sums are arranged in memory (which moves them by rounding only).
_NO_NUMBERS = {
    "model.local_files_only",
    "data.accept_changed",
    "data.eval",
    "data.eval_split",
    "data.streaming",
    "data.tokens_dir",
    "train.logging_steps",
    "train.eval_steps",
    "train.eval_answers",
    "train.eval_answer_tokens",
    "train.remat",
    "train.deterministic",
    "train.loss_chunk",
    "train.memory_limit",
    "train.on_nonfinite",
}
_SECTIONS: dict[str, Any] = typing.get_type_hints(RunConfig)
_FIELDS = {name: typing.get_type_hints(section) for name, section in _SECTIONS.items()}
_KNOWN = [f"{name}.{field}" for name, fields in _FIELDS.items() for field in fields]
# YAML 1.1 takes 1e-4 for text because it has no point; every reader means the number.
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# YAML 1.1 takes 010 for eight and 1:30 for ninety, which few who write them mean.
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """YAML's plain data types. What would silently mean something else is an error: a key written twice, of which the
    last would win, and numbers to base 8 or 60."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        number = isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS
        if number and _OTHER_BASE.fullmatch(str(node.value)):
            raise UserError(
                f"line {node.start_mark.line + 1}: YAML takes {node.value} for a number to base 8 or 60; write a "
                "decimal number without a leading zero, or quote it where text is meant"
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: the key {key.value} is given twice; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file of sections, apply `section.key=value` overrides (values in YAML's syntax), and check the whole.

    Paths inside stay as written: relative ones are meant from the current directory. Raises UserError, naming the file
    and the dotted key, for whatever the user can fix.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}; check the path given to --config") from error
    try:
        raw = _parse(text)
        return from_dict(_apply_overrides({} if raw is None else raw, overrides))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parse(text: str) -> Any:
    """YAML's value; YAMLError or UserError for whatever is wrong with it."""
    try:
        return yaml.load(text, _Loader)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("brackets or indentation are nested too deeply; a configuration has two levels") from error
    # Of dates with a 13th month, and of numbers with thousands of digits.
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error


def from_dict(raw: Any) -> RunConfig:
    """Build a RunConfig from nested mappings such as YAML gives. Every unknown or missing key is in one UserError."""
    if not isinstance(raw, Mapping):
        raise UserError(f"a configuration must consist of sections ({', '.join(_SECTIONS)}), not of {shown(raw)}")
    problems = [_unknown(f"{name}") for name in raw if name not in _SECTIONS]
    values: dict[str, dict[str, Any]] = {}
    for name, section in _SECTIONS.items():
        given = {} if raw.get(name) is None else raw[name]
        if name == "mesh" and given == "auto":
            given = {"auto": True}
        if not isinstance(given, Mapping):
            raise UserError(f"{name} is {shown(given)}; it must be a section of keys: {', '.join(_FIELDS[name])}")
        problems += [_unknown(f"{name}.{key}") for key in given if key not in _FIELDS[name]]
        for field in dataclasses.fields(section):
            if field.default is dataclasses.MISSING and field.name not in given:
                problems.append(f"{name}.{field.name} is missing: add it to the file, or --set {name}.{field.name}=...")
        values[name] = {key: _number(value, _FIELDS[name].get(key)) for key, value in given.items()}
    if problems:
        raise UserError("\n".join(problems))
    return RunConfig(**{name: section(**values[name]) for name, section in _SECTIONS.items()})


def _unknown(key: str) -> str:
    if key in _KNOWN:
        return "unknown section {}; write {}: and, indented below it, {}:".format(key, *key.split("."))
    section, _, name = key.partition(".")
    if elsewhere := [known for known in _KNOWN if known.partition(".")[2] == (name or section)]:
        return f"unknown key {key}; did you mean {elsewhere[0]}?"
    prefix, word, names = (f"{section}.", name, _FIELDS[section]) if section in _FIELDS else ("", section, _SECTIONS)
    if guess := nearest(word, names):
        return f"unknown key {key}; did you mean {prefix}{guess}?"
    return f"unknown key {key}; known here: {', '.join(names)}"


def _number(value: Any, expected: Any) -> Any:
    takes_float = expected is float or float in typing.get_args(expected)
    return float(value) if takes_float and isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _apply_overrides(raw: Any, overrides: Sequence[str]) -> Any:
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            raise UserError(f"cannot read the override {override!r}; write section.key=value, as in train.max_steps=10")
        if not text.strip():
            raise UserError(f"the override {override!r} has no value; write {key}=null to unset the key")
        try:
            value = _parse(text)
        except yaml.YAMLError as error:
            raise UserError(f"cannot read the value of {key}: {text!r} is no valid YAML; quote it ({error})") from error
        except UserError as error:
            raise UserError(f"cannot read the value of {key}: {error}") from error
        if isinstance(raw, Mapping) and isinstance(raw.get(section) or {}, Mapping):
            raw = {**raw, section: {**(raw.get(section) or {}), name: value}}
    return raw


def list_values(text: str) -> list[Any]:
    """Values written one after another with commas, each in YAML's syntax, as in `8,16` or `[q_proj],[q_proj,v_proj]`.

    Raises:
        UserError: no valid YAML.
    """
    try:
        values = yaml.load(f"[{text}]", _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the values {text!r}: no valid YAML; quote them ({error})") from error
    return list(values)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The configuration, defaults included, as nested dicts of plain values that JSON and YAML hold exactly."""
    plain = dataclasses.asdict(config)
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
        for name, section in plain.items()
    }


def dump_yaml(config: RunConfig) -> str:
    """The text of a file from which `load_config` gives an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def determining(config: RunConfig) -> dict[str, Any]:
    """By dotted key, the settings that decide what a run computes at each step, up to rounding.

    The horizon is among them only where the learning rate depends on it: a run at a constant rate can be prolonged.
    """
    flat = _flatten(config)
    left_out = set(_NO_NUMBERS)
    if config.train.lr_scheduler_type == "constant":
        left_out |= {"train.max_steps", "train.num_train_epochs"}
    return {k: v for k, v in flat.items() if k not in left_out and not k.startswith(("output.", "mesh."))}


def fingerprint(config: RunConfig) -> str:
    """A SHA-256, in hexadecimal, over the `determining` settings: equal for runs that compute the same."""
    return hashlib.sha256(json.dumps(determining(config), sort_keys=True).encode()).hexdigest()


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """By dotted key, the two values of every setting that differs."""
    flat_a, flat_b = _flatten(a), _flatten(b)
    return {key: (value, flat_b[key]) for key, value in flat_a.items() if value != flat_b[key]}


def _flatten(config: RunConfig) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, section in to_dict(config).items() for key, value in section.items()}


def local_path(name: str, suffixes: Sequence[str] = DATA_SUFFIXES) -> Path | None:
    """`name` as a path where it exists or can only be meant as one; None where it may be a hub id (`name`, `org/name`).

    Only a path starts with `/`, `.` or `~`, has two slashes or more, or ends in one of `suffixes`.
    """
    path = Path(name).expanduser()
    only_a_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.lower().endswith(tuple(suffixes))
    return path if only_a_path or os.path.exists(path) else None


def check_files(config: RunConfig) -> None:
    """Raise UserError for a local file that the run names and that is not there, before any slow import or download.

    Files inside packages (`package:`) are left to `loading.resolve_source`.
    """
    model = config.model.name_or_path
    if not model.startswith("package:") and (path := local_path(model, MODEL_SUFFIXES)) and not os.path.exists(path):
        raise UserError(_absent("model.name_or_path", path))
    named = [("data.train", source) for source in config.data.sources]
    for key, source in [*named, *(("data.eval", source) for source in config.data.eval_sets.values())]:
        if (path := local_path(source)) and not os.path.exists(path):
            raise UserError(_absent(key, path))
    start = config.lora.start_from
    if start is not None and not (adapter := Path(start).expanduser()).is_dir():
        raise UserError(_absent("lora.start_from", adapter, "directory"))
    output = Path(config.output.dir).expanduser()
    if os.path.exists(output) and not output.is_dir():
        raise UserError(f"output.dir is {output}, which is a file; name a directory")


def _absent(key: str, path: Path, kind: str = "file") -> str:
    where = "" if path.is_absolute() else f" in {Path.cwd()}, from where relative paths are taken"
    return f"{key} is {path}, but there is no such {kind}{where}; correct {key}"
