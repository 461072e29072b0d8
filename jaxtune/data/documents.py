"""The documents of a split, as compact as they can be looked up: in memory, or in files that are mapped into it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int, Int32

from jaxtune.errors import UserError

_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A record as the model sees it.

    weights: of each token as a target of the loss; 0 for token 0, which nothing precedes. record: its number, from 1.
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    record: int = 0


class Documents:
    """Ranges of one long run of tokens; several may share tokens, as a part of the documents does with the whole.

    A token takes 2 bytes, or 4 where the vocabulary needs them; weights are held as the places where they change. With
    a directory, tokens and weights lie in files there, which have no name and go with the process. What every document
    has beside is in memory, about 50 bytes.

    starts, lengths: of each document, in tokens. records: the number of its record. digests: of its record's tokens and
    weights, 16 bytes; equal for equal ones.
    """

    def __init__(
        self, documents: Iterable[Document] = (), *, vocabulary: int = 2**31, directory: str | Path | None = None
    ) -> None:
        """vocabulary: more than any token id. directory: made if need be; None for memory.

        Raises:
            UserError: `directory` cannot be written, or its disk is full.
        """
        tokens = _Column(np.uint16 if vocabulary <= 2**16 else np.int32, directory)
        changes, weights = _Column(np.int64, directory), _Column(np.float32, directory)
        lengths, records, digests = _Column(np.int64), _Column(np.int64), _Column(np.uint8)
        for document in documents:
            places = np.flatnonzero(np.diff(document.weights, prepend=np.nan))
            changes.append(tokens.size + places)
            weights.append(document.weights[places])
            tokens.append(document.tokens)
            lengths.append(np.array([len(document.tokens)]))
            records.append(np.array([document.record]))
            digests.append(np.frombuffer(digest(document), np.uint8))
        self._tokens, self._changes, self._weights = tokens.array(), changes.array(), weights.array()
        self.lengths: Int[np.ndarray, " documents"] = lengths.array()
        self.starts: Int[np.ndarray, " documents"] = np.cumsum(self.lengths) - self.lengths
        self.records: Int[np.ndarray, " documents"] = records.array()
        self.digests: np.ndarray = digests.array().view(f"S{_DIGEST_BYTES}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Document:
        start = int(self.starts[index])
        stop = start + int(self.lengths[index])
        first = int(np.searchsorted(self._changes, start, "right")) - 1
        last = int(np.searchsorted(self._changes, stop, "left"))
        edges = np.concatenate([[start], self._changes[first + 1 : last], [stop]])
        weights = np.repeat(self._weights[first:last], np.diff(edges))
        weights[:1] = 0.0
        return Document(self._tokens[start:stop].astype(np.int32), weights, int(self.records[index]))

    def part(
        self,
        index: Int[np.ndarray, " chosen"],
        offsets: Int[np.ndarray, " chosen"] | int = 0,
        lengths: Int[np.ndarray, " chosen"] | None = None,
    ) -> Documents:
        """Some of the documents, or ranges in them, over the same tokens. The first token of each learns nothing."""
        chosen = Documents()
        chosen._tokens, chosen._changes, chosen._weights = self._tokens, self._changes, self._weights
        chosen.starts = self.starts[index] + offsets
        chosen.lengths = self.lengths[index] if lengths is None else lengths
        chosen.records, chosen.digests = self.records[index], self.digests[index]
        return chosen

    def learnt(self) -> Int[np.ndarray, " documents"]:
        """How many tokens of each document have weight in the loss."""
        spans = np.diff(self._changes, append=len(self._tokens)) * (np.asarray(self._weights) != 0)
        before = np.cumsum(spans) - spans

        def below(places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
            """Tokens with weight that stand before each place."""
            run = np.maximum(np.searchsorted(self._changes, places, "right") - 1, 0)
            return before[run] + (places - self._changes[run]) * (self._weights[run] != 0)

        if not len(spans):
            return np.zeros(len(self), np.int64)
        return below(self.starts + self.lengths) - below(np.minimum(self.starts + 1, self.starts + self.lengths))


def digest(document: Document) -> bytes:
    """What two documents have in common that are equal in tokens and weights."""
    return hashlib.blake2b(document.tokens.tobytes() + document.weights.tobytes(), digest_size=_DIGEST_BYTES).digest()


class _Column:
    """An array that grows, in memory or in a file without a name."""

    def __init__(self, dtype: Any, directory: str | Path | None = None) -> None:
        self.dtype, self.size, self._directory = np.dtype(dtype), 0, directory
        self._file: IO[bytes] | None = None
        self._memory = bytearray()
        if directory is not None:
            with self._writing():
                path = Path(directory).expanduser()
                path.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=path)  # noqa: SIM115 - `array` closes it

    def append(self, values: np.ndarray) -> None:
        data = values.astype(self.dtype, copy=False).tobytes()
        self.size += len(values)
        if self._file is None:
            self._memory += data
        else:
            with self._writing():
                self._file.write(data)

    def array(self) -> np.ndarray:
        """All of it, not copied; nothing may be appended afterwards."""
        if self._file is None:
            return np.frombuffer(self._memory, self.dtype)
        with self._writing(), self._file as file:
            file.flush()
            # An empty file cannot be mapped.
            return np.memmap(file, self.dtype, "r") if self.size else np.zeros(0, self.dtype)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.tokens_dir {self._directory} cannot hold the tokens: {error}; make room there, or name another"
            ) from error
