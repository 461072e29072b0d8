"""Which tiles of scores there are, and which of them the kernels through Triton visit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels._device import compute_capability
from pallas_kernels.attention.xla import Form

# Bytes of shared memory that a program may have, by compute capability.
_SHARED_BYTES = {8.0: 163_000, 8.7: 163_000, 9.0: 227_000, 10.0: 227_000}
_LEAST_SHARED_BYTES = 99_000


class Tiles(NamedTuple):
    """Queries and keys that a program works on at a time, its warps, and tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# By pass, then by head width up to which they serve.
TILES = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(64, 32, 4, 2)},
    "keys": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 32, 4, 2)},
    "queries": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
}


def filled(width: int) -> int:
    """Columns of a head in registers: what products take."""
    return max(16, pl.next_power_of_2(width))


def tiling(name: str, q: Array) -> Tiles:
    """The tiling of a pass, with fewer tiles in flight where the GPU holds no more."""
    width, item = filled(q.shape[3]), q.dtype.itemsize
    tiles = next(tiles for widest, tiles in TILES[name].items() if width <= widest)
    kept, moving = (tiles.keys, tiles.queries) if name == "keys" else (tiles.queries, tiles.keys)
    kept *= 1 if name == "forward" else 2
    limit = _SHARED_BYTES.get(compute_capability() or 0.0, _LEAST_SHARED_BYTES)
    fitting = (limit - kept * width * item) // (2 * moving * width * item)
    return tiles._replace(stages=max(1, min(tiles.stages, fitting)))


class Span(NamedTuple):
    """The tiles that one tile has to do with: first to end, of which whole_first to whole_end need no mask."""

    first: Array
    whole_first: Array
    whole_end: Array
    end: Array

    def masked(self) -> Array:
        """How many tiles are masked: those in front of the whole ones, and those behind."""
        return self.end - self.first - (self.whole_end - self.whole_first)

    def masked_tile(self, step: Array) -> Array:
        """The tile of one of these steps."""
        tile = self.first + step
        return jnp.where(tile < self.whole_first, tile, tile + self.whole_end - self.whole_first)


def spans_of(seen: tuple[Any, Any], axis: int) -> Array:
    """A `Span` of tiles along `axis` of `seen_tiles`'s results for each tile along the other: int32 [B, tiles, 4].

    Where whole tiles are not all beside each other, those from the first one on until one is not whole count as such.
    """
    # What is known when the program is made is computed then: XLA takes seconds to fold it.
    xp: Any = np if isinstance(seen[0], np.ndarray) else jnp
    some, whole = (xp.moveaxis(x, axis, 2) for x in seen)
    index, count = xp.arange(some.shape[2]), some.shape[2]
    first, end = xp.argmax(some, axis=2), count - xp.argmax(some[..., ::-1], axis=2)
    whole_first = xp.where(xp.any(whole, axis=2), xp.argmax(whole, axis=2), end)
    broken = ~whole & (index >= whole_first[..., None])
    whole_end = xp.where(xp.any(broken, axis=2), xp.argmax(broken, axis=2), count)
    spans = xp.stack([first, whole_first, xp.where(whole_first < end, whole_end, end), end], axis=2)
    return jnp.asarray(spans, jnp.int32)


def seen_tiles(segment_ids: Array | None, shape: tuple[int, ...], form: Form, tiles: Tiles) -> tuple[Any, Any]:
    """Which tiles of keys a tile of queries may see some of, and which each of its queries sees whole: bool
    [B, query tiles, key tiles], of NumPy where there are no documents. On the diagonal there is always something to
    see, and always something masked.

    Documents are told apart by the least and the largest number in a tile: exactly where numbers rise along a row, and
    with some tiles too many where they do not.
    """
    b, t = shape[:2]
    first_query, first_key = (np.arange(0, t, size) for size in (tiles.queries, tiles.keys))
    end_query, end_key = first_query + tiles.queries, first_key + tiles.keys
    some = first_key[None, :] < np.minimum(end_query, t)[:, None]
    # What ends behind the row is not whole, nor is a tile of one: its last tile must be there to be masked.
    whole = (end_key[None, :] <= first_query[:, None]) & (end_query[:, None] <= t)
    if form.window is not None:
        some &= np.minimum(end_key, t)[None, :] > first_query[:, None] - form.window + 1
        whole &= first_key[None, :] > end_query[:, None] - 1 - form.window
    some_1xQxS, whole_1xQxS = some[None], whole[None]
    if segment_ids is None:
        return np.broadcast_to(some_1xQxS, (b, *some.shape)), np.broadcast_to(whole_1xQxS, (b, *some.shape))

    def extremes(size: int) -> tuple[Array, Array]:
        padded = jnp.pad(segment_ids, ((0, 0), (0, -t % size)), mode="edge").reshape(b, -1, size)
        return jnp.min(padded, axis=2), jnp.max(padded, axis=2)

    (q_least, q_most), (k_least, k_most) = extremes(tiles.queries), extremes(tiles.keys)
    related = (k_least[:, None, :] <= q_most[:, :, None]) & (k_most[:, None, :] >= q_least[:, :, None])
    one = (q_least == q_most)[:, :, None] & (k_least == k_most)[:, None, :] & (q_least[:, :, None] == k_least[:, None])
    return some_1xQxS & related, whole_1xQxS & one
