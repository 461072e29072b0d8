"""Attention through Triton's interpreter against float32 truth: documents, windows, soft-caps, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import assume_capability, lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.attention import attention
from pallas_kernels.attention import tiles as visited
from pallas_kernels.attention.reference import attention_reference, visible
from pallas_kernels.attention.xla import Form

SMALL = {
    name: {256: visited.Tiles(queries, keys, 4, 1)}
    for name, queries, keys in [("forward", 32, 16), ("keys", 16, 32), ("queries", 16, 16)]
}


def draw(b: int, t: int, n: int, kv: int, h: int, dtype: str) -> list[jax.Array]:
    rng = np.random.default_rng(b * t + n * h)
    return [jnp.asarray(rng.standard_normal((b, t, heads, h)), dtype) for heads in (n, kv, kv, n)]


def documents(b: int, t: int, kind: str) -> jax.Array | None:
    """Ragged documents, then padding with the number 0; or numbers that fall, and that come back."""
    if kind == "none":
        return None
    cuts = np.array([0, t // 6, t // 6 + 1, t // 2, t - 3])
    rising = np.searchsorted(cuts, np.arange(t), side="right") % 5
    rows = [rising, rising[::-1] if kind == "any" else np.minimum(rising, 2)]
    return jnp.asarray(np.stack([rows[i % 2] for i in range(b)]), jnp.int32)


def results(f: object, q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> list[np.ndarray]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(f, q, k, v)
        return y, *pull(dy)

    return [np.asarray(x, np.float64) for x in jax.jit(run)(q, k, v, dy)]


@pytest.mark.parametrize(
    ("b", "t", "heads", "kind", "window", "cap", "dtype"),
    [
        (1, 64, (2, 1, 16), "none", None, None, "float32"),
        (1, 75, (4, 2, 32), "rising", None, None, "float32"),
        (2, 60, (2, 2, 24), "any", 20, 1.5, "float32"),
        (1, 1, (1, 1, 16), "none", None, None, "float32"),
        (2, 50, (2, 1, 32), "rising", None, 0.5, "bfloat16"),
        (2, 61, (6, 2, 16), "rising", 9, 2.0, "bfloat16"),
        (2, 45, (3, 1, 9), "any", 33, 0.8, "float16"),
    ],
)
def test_values_and_gradients(
    b: int,
    t: int,
    heads: tuple[int, int, int],
    kind: str,
    window: int | None,
    cap: float | None,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visited, "TILES", SMALL)
    inputs = draw(b, t, *heads, dtype)
    segments = documents(b, t, kind)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        index = jnp.arange(t)
        return attention_reference(q, k, v, visible(index, index, segments, segments, window), heads[2] ** -0.5, cap)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, segment_ids=segments, window=window, cap=cap, implementation="triton")

    with interpreted():
        got = results(run, *inputs)
    own, truth = results(reference, *inputs), results(reference, *(x.astype(jnp.float32) for x in inputs))
    for ours, theirs, true in zip(got, own, truth, strict=True):
        # float32: sums of t and of h products of about unit size, in another order, and exp2 of differences; where a
        # query sees one key, a gradient is the difference of two equal sums.
        limit = 1.5 * np.linalg.norm(theirs - true) + 3e-6 * np.linalg.norm(true) + 2e-6
        assert np.linalg.norm(ours - true) <= limit


@pytest.mark.parametrize("scale", [0.2, 0.0, -0.3])
def test_rows_that_see_nothing_of_a_tile_and_any_scale(scale: float) -> None:
    """Whatever the compiler fuses: a masked score minus the largest of masked scores is nothing, and not its error."""
    q, k, v, _ = draw(1, 200, 4, 2, 32, "float32")
    index = jnp.arange(200)
    with interpreted():
        y = attention(q, k, v, window=70, scale=scale, implementation="triton")
    np.testing.assert_allclose(
        y, attention_reference(q, k, v, visible(index, index, None, None, 70), scale, None), atol=3e-6
    )


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("t", [64, 61])
@pytest.mark.parametrize("axis", [1, 2])
def test_tiles_that_nobody_sees_are_not_visited_and_whole_ones_not_masked(
    t: int, window: int | None, axis: int
) -> None:
    tiles = visited.Tiles(8, 4, 4, 1)
    segments = np.repeat([1, 2, 3], [25, 24, t - 49])
    index = np.arange(t)
    seen = (index[None] <= index[:, None]) & (segments[None] == segments[:, None])
    if window is not None:
        seen &= index[None] > index[:, None] - window
    filled = np.pad(seen, (0, 64 - t)).reshape(8, 8, 16, 4)
    some, whole = filled.any(axis=(1, 3)), filled.all(axis=(1, 3))
    if axis == 1:
        some, whole = some.T, whole.T
    ids = jnp.asarray(segments[None], jnp.int32)
    spans = visited.spans_of(visited.seen_tiles(ids, (1, t), Form(1.0, window), tiles), axis)[0]
    for row, (first, whole_first, whole_end, end) in enumerate(np.asarray(spans)):
        np.testing.assert_array_equal(np.flatnonzero(some[row]), np.arange(first, end))
        np.testing.assert_array_equal(np.flatnonzero(whole[row]), np.arange(whole_first, whole_end))
        span = visited.Span(*(jnp.int32(x) for x in (first, whole_first, whole_end, end)))
        masked = [int(span.masked_tile(jnp.int32(step))) for step in range(int(span.masked()))]
        assert sorted([*masked, *range(whole_first, whole_end)]) == list(range(first, end))


@pytest.mark.parametrize(
    ("shape", "window", "cap"),
    [((4, 2048, 32, 8, 128), None, None), ((1, 2048, 16, 8, 256), 512, 50.0), ((2, 1000, 9, 3, 64), None, None)]
    + [((1, 2048, 4, 2, 80), None, None), ((2, 1000, 32, 32, 96), 512, None), ((1, 512, 8, 4, 192), None, 30.0)],
)
def test_lowers_to_cuda(shape: tuple[int, ...], window: int | None, cap: float | None) -> None:
    b, t, n, kv, h = shape
    q, k = (jax.ShapeDtypeStruct((b, t, heads, h), jnp.bfloat16) for heads in (n, kv))
    segments = jax.ShapeDtypeStruct((b, t), jnp.int32)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
        def f(*qkv: jax.Array) -> jax.Array:
            y = attention(*qkv, segment_ids=segments, window=window, cap=cap, implementation="triton")
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(f, argnums=(0, 1, 2))(q, k, v)

    text = lower_for_cuda(gradients, q, k, k, segments)
    assert all(name in text for name in ("attention_d_queries", "attention_d_keys"))


def test_heads_that_are_too_wide_are_refused() -> None:
    q, k, v, _ = draw(1, 8, 1, 1, 264, "bfloat16")
    with interpreted(), pytest.raises(NotImplementedError, match="up to 256, not 264"):
        attention(q, k, v, implementation="triton")


@pytest.mark.parametrize(
    ("capability", "bytes_there"), [(8.0, 163_840), (8.6, 101_376), (8.9, 101_376), (9.0, 232_448)]
)
@pytest.mark.parametrize("width", [64, 96, 256])
def test_tiles_in_flight_fit_the_gpu(capability: float, bytes_there: int, width: int) -> None:
    q = jax.ShapeDtypeStruct((1, 4096, 8, width), jnp.bfloat16)
    with assume_capability(capability):
        for name in visited.TILES:
            tiles = visited.tiling(name, q)
            kept, moving = (tiles.keys, tiles.queries) if name == "keys" else (tiles.queries, tiles.keys)
            arrays = kept * (1 if name == "forward" else 2) + 2 * tiles.stages * moving
            assert arrays * visited.filled(width) * 2 <= bytes_there
