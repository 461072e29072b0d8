"""An embedding table in host memory, of which the device gets the rows that a batch needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  numpy's bfloat16
import numpy as np


class HostEmbedding:
    """The table [V, D] of a frozen tree, taken out of it."""

    def __init__(self, frozen: Mapping[str, Any]) -> None:
        rest = dict(frozen)
        self._table = np.asarray(rest.pop("embed_tokens")["embedding"])
        self.without_table = rest
        self.nbytes = self._table.nbytes

    def with_rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch and, as `embedded`, the rows [accumulation, B, T, D] of its tokens."""
        return {**batch, "embedded": np.take(self._table, batch["tokens"], axis=0)}

    def whole(self) -> dict[str, Any]:
        """The frozen tree with the table on the device, for as long as somebody holds it."""
        return {**self.without_table, "embed_tokens": {"embedding": jax.numpy.asarray(self._table)}}
