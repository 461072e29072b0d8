"""A run's output directory: held by one run at a time, and never overwritten unasked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from jaxtune.checkpoint import Checkpoints
from jaxtune.config import RunConfig
from jaxtune.config_io import determining, dump_yaml, load_config
from jaxtune.errors import UserError, shown
from jaxtune.processes import agreed, is_first, several

log = logging.getLogger(__name__)

Resume = bool | Literal["auto"] | None
_ELSEWHERE = "name another with --set output.dir=..."
_LOCK = ".lock"
_SHOWN_SECONDS = 30.0


class RunDirectory:
    """`output.dir` of a run, locked from `__enter__` to `__exit__`; by the first of its processes.

    path: the directory. checkpoints: in it. resumes: whether the run goes on from a checkpoint. restarts: whether it
    replaces what a run of the same configuration left before its first checkpoint.
    """

    def __init__(self, config: RunConfig, resume: Resume = False) -> None:
        """resume: True asks for a checkpoint to go on from, False forbids one, "auto" takes one if there is any."""
        self.config = config
        self.path = Path(config.output.dir).expanduser().absolute()
        self.checkpoints = Checkpoints(
            self.path / "checkpoints", config.output.save_total_limit, config.output.keep_best
        )
        self.resumes = self.restarts = False
        self._resume = resume
        self._made: list[Path] = []
        self._lock: int | None = None

    def __enter__(self) -> RunDirectory:
        """Make and lock the directory.

        Raises:
            UserError: it cannot be written, another process holds it, or what is in it does not allow the run.
        """
        if is_first():
            self._take()
        held = self.path / _LOCK
        self.resumes, self.restarts, holder = agreed(
            [self.resumes, self.restarts, held.read_text() if several() and is_first() else ""]
        )
        if not is_first():
            _wait_for(held, holder)
        return self

    def _take(self) -> None:
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / _LOCK)
        except OSError as error:
            self._release()
            raise UserError(
                f"output.dir {shown(str(self.path))} cannot be written: {error.strerror}; {_ELSEWHERE}"
            ) from error
        except UserError:
            self._release()
            raise
        try:
            self._check()
        except BaseException:
            self._release()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def start(self) -> None:
        """Of the first process: write config.yaml, and remove the metrics of a run that is started again."""
        if not is_first():
            return
        if self.restarts:
            self.metrics.unlink(missing_ok=True)
        temporary = self.path / ".config.yaml.tmp"
        temporary.write_text(dump_yaml(self.config), encoding="utf-8")
        temporary.replace(self.path / "config.yaml")

    @property
    def metrics(self) -> Path:
        """The file of the run's records."""
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A directory to fill, which takes its name when the block ends well: all of its files appear at once."""
        target, temporary, old = (self.path / part for part in (name, f".{name}.tmp", f".{name}.old"))
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _check(self) -> None:
        remains = [name for name in ("config.yaml", "metrics.jsonl", "adapter") if (self.path / name).exists()]
        if self.checkpoints.latest() is not None:
            if not self._resume:
                raise UserError(
                    f"output.dir {self.path} holds a run already; continue it with --resume, or {_ELSEWHERE}"
                )
            self.resumes = True
        elif self._resume is True:
            raise UserError(
                f"--resume: no complete checkpoint in {self.checkpoints.directory}; run the same command without "
                "--resume (or with --resume auto) to start"
            )
        elif remains:
            self._check_restart(remains)
            self.restarts = True

    def _check_restart(self, remains: list[str]) -> None:
        """Pass only what a run of this configuration left, and nothing that took long to make."""
        advice = f"delete what is there, or {_ELSEWHERE}"
        if "adapter" in remains or "config.yaml" not in remains:
            raise UserError(f"output.dir {self.path} holds {', '.join(remains)}, but no checkpoint; {advice}")
        try:
            left = determining(load_config(self.path / "config.yaml"))
        except UserError as error:
            raise UserError(f"output.dir {self.path} holds the beginning of another run ({error}); {advice}") from error
        now = determining(self.config)
        changes = [
            f"{key}: {left.get(key)!r} then, {now.get(key)!r} now"
            for key in left | now
            if left.get(key) != now.get(key)
        ]
        if changes:
            raise UserError(
                f"output.dir {self.path} holds the beginning of a run that differs in {'; '.join(changes)}; {advice}"
            )

    def _release(self) -> None:
        """Unlock, and take away the directories made here that have stayed empty."""
        if self._lock is not None:
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _wait_for(path: Path, text: str) -> None:
    """Return once a file that process 0 has written shows here; a network's file system may take its time."""
    deadline = time.monotonic() + _SHOWN_SECONDS
    while not (path.exists() and path.read_text() == text):
        if time.monotonic() > deadline:
            raise UserError(
                f"process 0 holds output.dir {path.parent}, and {socket.gethostname()} does not see what it writes "
                "there; set output.dir to a directory that all hosts share"
            )
        time.sleep(0.1)


def _lock(path: Path) -> int:
    """Take the file's lock, which the system gives back when this process ends, however it ends."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise UserError(
                f"output.dir {path.parent} is in use by another run {holder}; wait until it ends, or {_ELSEWHERE}"
            ) from error
        except OSError as error:
            log.warning(
                "%s keeps no locks (%s): two runs at once in it would not be noticed", path.parent, error.strerror
            )
            return descriptor
        # The holder before may have deleted this file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
                return descriptor
        os.close(descriptor)
