"""Checkpoints of a run, on Orbax: adapter, optimizer state, step and data position; never the base model.

`python -m jaxtune.checkpoint verify DIR` reads every byte of a run's checkpoints and says which of them are whole.

A checkpoint is a directory named by its step. In it, `state/` is Orbax's, with the state as nested dicts of arrays, and
`meta.json` has the run's description, the arrays' shapes and dtypes, and a CRC-32 of each of Orbax's files and of its
own content. It is written under a temporary name, flushed to the disk and renamed, so a directory with a step for a
name is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxtune.config import RunConfig
from jaxtune.config_io import determining, diff, fingerprint, from_dict, to_dict
from jaxtune.errors import UserError
from jaxtune.memory import give_back_freed
from jaxtune.processes import agreed, is_first, several, together

_TEMPORARY = ".tmp-"
# Where model, data and first adapter come from, and what `auto` means, may change: model and data have fingerprints of
# their content, the adapter is in the checkpoint, and the dtype is compared as it was resolved. So may how a step's
# rows are cut into micro-batches, which moves its sums by rounding only.
_COMPARED_OTHERWISE = {
    "model.name_or_path",
    "model.revision",
    "model.sha256",
    "model.dtype",
    "lora.start_from",
    "data.train",
    "train.batch_size",
    "train.gradient_accumulation_steps",
}


class CorruptCheckpointError(UserError):
    """A checkpoint that cannot be read back as it was written."""


class Checkpoints:
    """The checkpoints of one run.

    directory: made when first saved to. keep_last: the newest complete checkpoints that are kept, at least 1.
    keep_best: those kept beside them, with the lowest `eval_loss` in their meta.
    """

    def __init__(self, directory: str | Path, keep_last: int = 2, keep_best: int = 0) -> None:
        assert keep_last >= 1, keep_last
        self.directory = Path(directory).expanduser().absolute()
        self.keep_last, self.keep_best = keep_last, keep_best

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        found = (path for path in self.directory.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
        return sorted(int(path.name) for path in found)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; None where there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> Path:
        """Write `state`, any pytree of arrays, and `meta`, any JSON. On return it is on the disk and is the latest.

        Only then are older checkpoints thinned to those to keep, and later ones deleted, which belong to a continuation
        that a resume from an earlier step has abandoned. Keys of jax.random are stored as their raw data.
        """
        path, temporary = self.directory / str(step), self.directory / f"{_TEMPORARY}{step}"
        named = _named_leaves(state)
        host = {name: jax.random.key_data(x) if _is_key(x) else x for name, x in named.items()}
        # Of several processes each writes the parts that its devices hold.
        host = host if several() else {name: _on_host(x) for name, x in host.items()}
        leaves = {name: _describe(x) for name, x in named.items()}
        key_impls = {name: str(jax.random.key_impl(x)) for name, x in named.items() if _is_key(x)}
        try:
            if is_first():
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in self.directory.glob(f"{_TEMPORARY}*"):
                    shutil.rmtree(leftover)
            together()
            # Compressing would take several times as long as writing, and save a twentieth: these numbers are noise.
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
                tree = unflatten_dict(host, sep="/")
                checkpointer.save(temporary / "state", args=ocp.args.PyTreeSave(tree))
            del host, tree
            give_back_freed()
            if not is_first():
                return path
            record: dict[str, Any] = {"step": step, "meta": dict(meta), "leaves": leaves, "key_impls": key_impls}
            record["files"] = _file_checksums(temporary / "state")
            guarded = {"format": 1, "crc32": _json_checksum(record), "record": record}
            (temporary / "meta.json").write_text(json.dumps(guarded, indent=1), encoding="utf-8")
            for written in [*temporary.rglob("*"), temporary]:
                _flush(written)
            if path.exists():
                self._discard(path)
            temporary.rename(path)
            _flush(self.directory)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot write the checkpoint {path}: {error}; earlier ones are untouched. Make room there, or change "
                "output.dir"
            ) from error
        steps = [other for other in self.steps() if other <= step]
        best = self.best(steps)[: self.keep_best] if self.keep_best else []
        for other in set(self.steps()) - {*steps[-self.keep_last :], *best}:
            # What has no meta.json is not ours to delete.
            if (self.directory / str(other) / "meta.json").is_file():
                self._discard(self.directory / str(other))
        return path

    def best(self, steps: Sequence[int] | None = None) -> list[int]:
        """Of these steps, or of all, those whose meta has a held-out loss: the lowest first, of equals the older."""
        losses = {}
        for step in self.steps() if steps is None else steps:
            with contextlib.suppress(CorruptCheckpointError):
                losses[step] = self.read_meta(step).get("eval_loss")
        return sorted((step for step in losses if losses[step] is not None), key=lambda step: (losses[step], step))

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint such that a half-deleted one has no step for a name."""
        doomed = path.rename(self.directory / f"{_TEMPORARY}discarded-{path.name}")
        shutil.rmtree(doomed)

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was given to `save` as meta, and `step`."""
        return {"step": step, **self._read_record(step)["meta"]}

    def _read_record(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        if not path.is_dir():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}; it has: {have}")
        try:
            guarded = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if guarded["format"] != 1:
                raise UserError(
                    f"{path / 'meta.json'} is not of format 1, which this release reads; use the one it is from"
                )
            record: dict[str, Any] = guarded["record"]
            if guarded["crc32"] != _json_checksum(record):
                raise ValueError("it has changed since it was written")
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(f"the checkpoint {path} is damaged: meta.json: {error}") from error
        return record

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read one checkpoint, bit for bit.

        Args:
            step: which one.
            abstract_state: a pytree of arrays or jax.ShapeDtypeStruct like the one saved; arrays go to its shardings.

        Returns:
            The state, with the structure of `abstract_state`, and the meta as `read_meta` gives it.

        Raises:
            CorruptCheckpointError: a file is missing or changed.
            UserError: no such checkpoint, or one of a state with other arrays.
        """
        record, path = self._read_record(step), self.directory / str(step)
        wanted, found = _named_leaves(abstract_state), record["leaves"]
        problems = [f"{name} is not in it" for name in wanted if name not in found]
        problems += [f"{name} is not in the run's state" for name in found if name not in wanted]
        for name in wanted.keys() & found.keys():
            if (now := _describe(wanted[name])) != found[name]:
                problems.append(f"{name} is {found[name]} in it, {now} now")
        if problems:
            lines = "\n  ".join(sorted(problems))
            raise UserError(
                f"the checkpoint {path} is of another kind of run:\n  {lines}\n"
                "Resume with the configuration it was written with, or start a new run in another output.dir"
            )
        if is_first():
            _check_files(path, record)
        targets = unflatten_dict({name: _target(like) for name, like in wanted.items()}, sep="/")
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(targets))
        host = flatten_dict(restored, sep="/")
        leaves = [_place(host[name], like, record["key_impls"].get(name)) for name, like in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), {"step": step, **record["meta"]}

    def verify(self, step: int) -> dict[str, Any]:
        """Read every byte of one checkpoint and compare it with what was written; nothing is loaded.

        Returns:
            Its meta as `read_meta` gives it.

        Raises:
            CorruptCheckpointError: naming every file that is missing or changed.
            UserError: no such checkpoint.
        """
        record, path = self._read_record(step), self.directory / str(step)
        _check_files(path, record)
        return {"step": step, **record["meta"]}

    def restore_latest(
        self, abstract_state: Any, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """`restore` the newest checkpoint that can be read; each newer one passed over gives a warning that says why.

        check: called with the meta before any array is read, to raise where the run is another (`check_compatible`).
        """
        for step in reversed(self.steps() if is_first() else ()):
            try:
                if check is not None:
                    check(self.read_meta(step))
                if several():
                    self.verify(step)
                return self.restore(agreed(step), abstract_state)
            except CorruptCheckpointError as error:
                warnings.warn(f"{error}. Falling back to the checkpoint before it", stacklevel=2)
        if not is_first():
            return self.restore(agreed(None), abstract_state)
        raise UserError(f"there is no readable checkpoint in {self.directory}; start a new run, without resume")


def run_meta(config: RunConfig, data: str, model: str, dtype: str, **extra: Any) -> dict[str, Any]:
    """The meta of a run's checkpoint: what `check_compatible` compares, and `extra` such as the held-out loss.

    data, model: fingerprints of their content. dtype: name of the compute dtype.
    """
    contents = {"data": data, "model": model, "dtype": dtype}
    return {"config": to_dict(config), "config_fingerprint": fingerprint(config), "contents": contents, **extra}


def check_compatible(meta: Mapping[str, Any], config: RunConfig, data: str, model: str, dtype: str) -> None:
    """Raise UserError, naming every difference, where going on from `meta` would not continue the same run.

    With `data.accept_changed`, other data are no difference.
    """
    try:
        saved, contents = from_dict(meta["config"]), meta["contents"]
        pairs: list[tuple[str, Any, Any]] = [
            ("the base model's content", contents["model"], model),
            ("the compute dtype (model.dtype)", contents["dtype"], dtype),
        ]
        if not config.data.accept_changed:
            pairs.append(("the data's content", contents["data"], data))
        rows = "the rows of a step (train.batch_size x train.gradient_accumulation_steps)"
        pairs += [(rows, saved.train.rows_per_step, config.train.rows_per_step)]
    except (UserError, KeyError) as error:
        raise UserError(f"cannot resume: this release does not read the checkpoint's configuration: {error}") from error
    keys = (determining(saved).keys() | determining(config).keys()) - _COMPARED_OTHERWISE
    if config.data.accept_changed:
        keys = {key for key in keys if not key.startswith("data.")}
    changes = [f"{key}: {then!r} then, {now!r} now" for key, (then, now) in diff(saved, config).items() if key in keys]
    changes += [f"{name}: {then} then, {now} now" for name, then, now in pairs if then != now]
    if changes:
        lines = "\n  ".join(changes)
        hint = "" if contents["data"] == data else "With data.accept_changed: true a run goes on with other data. "
        raise UserError(
            f"cannot resume: the checkpoint of step {meta['step']} is of a run that differs in\n  {lines}\n"
            f"{hint}Undo these changes, or start a new run in another output.dir"
        )


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of one name"
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _on_host(leaf: Any) -> np.ndarray:
    """A leaf's values, one leaf at a time through the device's transfer buffers.

    Read through an array of their own: an array that is read itself keeps the copy, beyond the save.
    """
    if isinstance(leaf, jax.Array):
        parts = [shard.data for shard in leaf.addressable_shards]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    return np.asarray(leaf)


def _place(array: np.ndarray | jax.Array, like: Any, key_impl: str | None) -> jax.Array:
    if isinstance(array, jax.Array):
        return array
    value = array if key_impl is None else jax.random.wrap_key_data(jnp.asarray(array), impl=key_impl)
    return jax.device_put(value, getattr(like, "sharding", None))


def _target(like: Any) -> Any:
    """What Orbax is to make of a stored array: a NumPy array, and of several processes each its parts."""
    if several():
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    stored = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
    return np.broadcast_to(np.zeros((), stored.dtype), stored.shape)


def _json_checksum(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _file_checksums(root: Path) -> dict[str, int]:
    """CRC-32 of every file below `root`, by relative path."""
    checksums = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            value = 0
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    value = zlib.crc32(chunk, value)
            checksums[path.relative_to(root).as_posix()] = value
    return checksums


def _check_files(path: Path, record: Mapping[str, Any]) -> None:
    """Raise CorruptCheckpointError, naming every file of the checkpoint that is not as it was written."""
    found = _file_checksums(path / "state")
    damaged = [
        f"state/{name} " + ("has changed since it was written" if name in found else "is missing")
        for name, checksum in record["files"].items()
        if found.get(name) != checksum
    ]
    if damaged:
        raise CorruptCheckpointError(f"the checkpoint {path} is damaged: {'; '.join(damaged)}")


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find(directory: Path) -> tuple[Path, list[int]]:
    """The directory of checkpoints and the steps that a path means: a run, its checkpoints, or one of them."""
    if (directory / "meta.json").is_file() and directory.name.isdecimal():
        return directory.parent, [int(directory.name)]
    below = directory / "checkpoints"
    where = below if below.is_dir() else directory
    steps = Checkpoints(where).steps()
    if not steps:
        raise UserError(f"{directory} holds no checkpoint; name a run's output.dir, its checkpoints/, or one of them")
    return where, steps


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.checkpoint",
        description="Check a run's checkpoints.",
        epilog="exit status: 0 all are whole, 1 one is damaged, 2 something to correct, said in one message",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="read every byte and compare it with what was written")
    verify.add_argument("directory", type=Path, help="a run's output.dir, its checkpoints/, or one checkpoint")
    options = parser.parse_args(arguments)
    try:
        where, steps = _find(options.directory.expanduser().absolute())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    checkpoints, damaged = Checkpoints(where), 0
    for step in steps:
        try:
            meta = checkpoints.verify(step)
        except UserError as error:
            damaged += 1
            print(error)
        else:
            size = sum(path.stat().st_size for path in (where / str(step)).rglob("*") if path.is_file())
            of = f", of the configuration {meta['config_fingerprint'][:12]}" if "config_fingerprint" in meta else ""
            print(f"{where / str(step)}: whole, {size:,} bytes{of}")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
