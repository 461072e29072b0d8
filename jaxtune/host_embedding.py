"""An embedding table in host memory (`model.embedding_on_host`), of which the device gets the rows that it needs.

In training they wait in host memory beside the batch, taken from the table while the step before is computed, and the
step fetches them. In generation, where the device itself chooses the tokens, it reads them from the table
(`jaxtune.models.decoder.embed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  numpy's bfloat16
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Float, Int

# Where the table is in the tree.
TABLE = ("embed_tokens", "embedding")


def with_table_on_host(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """A frozen tree with its table, which may be a NumPy array, in host memory that the first device can read."""
    place = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    return {**frozen, TABLE[0]: {TABLE[1]: jax.device_put(frozen[TABLE[0]][TABLE[1]], place)}}


class HostEmbedding:
    """The table [V, D] of a frozen tree, taken out of it.

    without_table: the tree for the train step. whole: the tree for generation, the table in host memory.
    """

    def __init__(self, frozen: Mapping[str, Any]) -> None:
        self.whole = with_table_on_host(frozen)
        self.without_table = {name: tree for name, tree in self.whole.items() if name != TABLE[0]}
        self._table = np.asarray(self.whole[TABLE[0]][TABLE[1]])
        self.nbytes = self._table.nbytes

    def rows(self, tokens: Int[np.ndarray, "A B T"], sharding: NamedSharding) -> Float[jax.Array, "A B T D"]:
        """The tokens' rows, in host memory that the device can read. sharding: of the batch."""
        return jax.device_put(np.take(self._table, tokens, axis=0), sharding.with_memory_kind("pinned_host"))
