"""Causal attention against float64 truth, packed and unpacked, with every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import StackLayer
from pallas_kernels._device import assume_capability, lower_for_cuda
from pallas_kernels._dispatch import record_choices
from pallas_kernels._triton import interpreted
from pallas_kernels.attention import AttentionParts, attention, attention_into_cache, cached_attention
from pallas_kernels.attention import xla as attention_xla_module
from pallas_kernels.rope import split_rope

B, N, K, H = 2, 6, 2, 10


def inputs(length: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, H))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


def truth(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: np.ndarray | None,
    window: int | None = None,
    cap: float | None = None,
) -> np.ndarray:
    """Row by row and head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = np.arange(q.shape[1]) <= t
        if segments is not None:
            seen &= segments[b] == segments[b, t]
        if window is not None:
            seen &= np.arange(q.shape[1]) > t - window
        scores = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // (N // K)]
    return out


def segments_of(length: int) -> np.ndarray:
    """Ragged documents and padding, different in each row."""
    segments = np.zeros((B, length), np.int32)
    for row, cuts in enumerate(([0, length // 7, length // 2], [0, length - 5])):
        for number, cut in enumerate(cuts):
            segments[row, cut:] = number + 1
    segments[0, -3:] = 0
    return segments


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 37, 130])
def test_values(length: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_xla_module, "SLICE", 32)
    q, k, v = inputs(length)
    segments = segments_of(length) if packed and length > 10 else None
    out = attention(q, k, v, segment_ids=None if segments is None else jnp.asarray(segments), implementation="xla")
    np.testing.assert_allclose(out, truth(q, k, v, segments), atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "cap"), [(1, None), (20, None), (45, 2.0), (None, 0.7), (1000, None)])
def test_windows_and_soft_caps(
    window: int | None, cap: float | None, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows inside of a slice, across slices and wider than the row."""
    monkeypatch.setattr(attention_xla_module, "SLICE", 32)
    q, k, v = inputs(77)
    segments = segments_of(77) if packed else None
    out = attention(q, k, v, segment_ids=None if segments is None else jnp.asarray(segments), window=window, cap=cap)
    np.testing.assert_allclose(out, truth(q, k, v, segments, window, cap), atol=2e-6)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (11, None), (None, 1.5), (30, 0.5)])
def test_gradients(window: int | None, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliced attention's gradients against autodiff of the definition in one piece, in float64."""
    monkeypatch.setattr(attention_xla_module, "SLICE", 16)
    q, k, v = inputs(45)
    segments = segments_of(45)
    weights = np.random.default_rng(3).normal(size=q.shape)

    def sliced(*x: jax.Array) -> jax.Array:
        return jnp.sum(attention(*x, segment_ids=jnp.asarray(segments), window=window, cap=cap) * weights)

    ours = jax.grad(sliced, argnums=(0, 1, 2))(q, k, v)

    def definition(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = np.tril(np.ones((45, 45), bool)) & (segments[:, :, None] == segments[:, None, :])
        if window is not None:
            mask = mask & np.triu(np.ones((45, 45), bool), 1 - window)
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, axis=2)) / np.sqrt(H)
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        probabilities = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        return jnp.sum(jnp.einsum("bnts,bsnh->btnh", probabilities, jnp.repeat(v, N // K, axis=2)) * weights)

    with jax.enable_x64(True):
        expected = jax.grad(definition, argnums=(0, 1, 2))(
            *(jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v))
        )
    for actual, wanted in zip(ours, expected):
        np.testing.assert_allclose(actual, wanted, atol=5e-6)


def test_memory_is_that_of_one_slice() -> None:
    """A slice's scores, weights, their gradients and the mask: under six slices' worth, whatever the length."""
    length = 4096
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1))
    loss = jax.jit(jax.grad(lambda *x: jnp.sum(attention(*x, implementation="xla")), argnums=(0, 1, 2)))
    slice_scores = 4 * 2 * attention_xla_module.SLICE * length
    assert loss.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes < 6 * slice_scores


@pytest.mark.parametrize(("window", "cap"), [(None, None), (7, 1.5)])
def test_cached_tokens_see_what_they_saw_in_one_pass(window: int | None, cap: float | None) -> None:
    q, k, v = inputs(40)
    whole = attention(q, k, v, window=window, cap=cap)
    stale = 100.0 * jnp.ones((B, 15, K, H))
    k_cache, v_cache = jnp.concatenate([k, stale], axis=1), jnp.concatenate([v, stale], axis=1)
    for start, stop in ((0, 30), (30, 31), (31, 40)):
        step = cached_attention(q[:, start:stop], k_cache, v_cache, jnp.int32(start), window=window, cap=cap)
        np.testing.assert_allclose(step, whole[:, start:stop], atol=1e-6)


def test_padding_in_front_of_cached_rows_is_not_seen() -> None:
    """Each row against the same row without its padding, in one chunk and token by token."""
    q, k, v = inputs(20)
    first = jnp.array([7, 0], jnp.int32)
    k = k.at[0, :7].set(50.0)
    for start, stop in ((0, 20), (12, 13)):
        step = cached_attention(q[:, start:stop], k, v, jnp.int32(start), first=first)
        for row, before in enumerate((7, 0)):
            alone = attention(*(x[row : row + 1, before:] for x in (q, k, v)))
            from_ = max(before, start)
            np.testing.assert_allclose(step[row, from_ - start :], alone[0, from_ - before : stop - before], atol=1e-6)
        assert np.isfinite(step).all()


def test_a_named_implementation_never_falls_back() -> None:
    q, k, v = inputs(8)
    with pytest.raises(NotImplementedError, match=r"cudnn.*needs an NVIDIA GPU"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="unknown implementation 'flash'"):
        attention(q, k, v, implementation="flash")


def test_what_adds_up_in_any_order_can_be_left_out() -> None:
    q = jnp.zeros((1, 64, 4, 64), jnp.bfloat16)
    with assume_capability(8.0), record_choices(trace_as="xla") as choices:
        for deterministic in (False, True):
            jax.eval_shape(lambda q, d=deterministic: attention(q, q, q, deterministic=d), q)
    assert [choice.implementation for choice in choices] == ["cudnn", "triton"]
    assert ("cudnn", "its backward pass adds up gradients in any order") in choices[1].refused


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs(8)
    with pytest.raises(ValueError, match="N a multiple of K"):
        attention(q[:, :, :5], k, v)
    with pytest.raises(ValueError, match="both must be positive"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="both must be positive"):
        cached_attention(q, k, v, 0, cap=-1.0)


@pytest.mark.parametrize(
    ("heads", "width", "capacity", "start", "first", "window", "cap"),
    [
        ((8, 2), 64, 300, 150, [7, 0], None, None),
        ((6, 2), 32, 200, 199, None, 50, 3.0),
        ((4, 4), 16, 64, 0, [0, 0], None, None),
        ((16, 1), 128, 130, 70, [0, 69], 500, None),
    ],
)
def test_one_query_through_triton(
    heads: tuple[int, int],
    width: int,
    capacity: int,
    start: int,
    first: list[int] | None,
    window: int | None,
    cap: float | None,
) -> None:
    """A cache of one layer in a stack, in parts of which some are empty; what is not to be seen is NaN."""
    rng = np.random.default_rng(start)
    q = jnp.asarray(rng.standard_normal((2, 1, heads[0], width)), jnp.bfloat16)
    caches = [jnp.asarray(rng.standard_normal((3, 2, capacity, heads[1], width)), jnp.bfloat16) for _ in "kv"]
    begin = None if first is None else jnp.asarray(first, jnp.int32)
    form: Any = {"first": begin, "window": window, "cap": cap}
    seen = jnp.arange(capacity) <= start
    hidden = [jnp.where(seen[:, None, None], cache, jnp.nan) for cache in caches]
    with interpreted():
        layers = [StackLayer(cache, jnp.int32(1)) for cache in hidden]
        got = cached_attention(q, *layers, jnp.int32(start), implementation="triton", **form)
    own = cached_attention(q, *(cache[1] for cache in caches), start, implementation="xla", **form)
    exact = [x.astype(jnp.float32) for x in (q, *(cache[1] for cache in caches))]
    true = np.asarray(cached_attention(*exact, start, implementation="xla", **form))
    assert np.linalg.norm(got - true) <= 1.5 * np.linalg.norm(own - true)


@pytest.mark.parametrize(
    ("heads", "length", "start", "first", "window", "cap"),
    [
        ((8, 2), 40, 0, None, None, None),
        ((6, 2), 70, 90, [95, 0], None, 3.0),
        ((4, 4), 64, 130, [0, 150], 50, None),
    ],
)
def test_a_chunk_of_queries_through_triton(
    heads: tuple[int, int], length: int, start: int, first: list[int] | None, window: int | None, cap: float | None
) -> None:
    """Tiles whole and not, queries that are padding, and windows that end within a tile; what comes after is NaN."""
    rng = np.random.default_rng(length)
    q = jnp.asarray(rng.standard_normal((2, length, heads[0], 32)), jnp.bfloat16)
    caches = [jnp.asarray(rng.standard_normal((3, 2, 256, heads[1], 32)), jnp.bfloat16) for _ in "kv"]
    begin = None if first is None else jnp.asarray(first, jnp.int32)
    form: Any = {"first": begin, "window": window, "cap": cap}
    hidden = [jnp.where((jnp.arange(256) < start + length)[:, None, None], cache, jnp.nan) for cache in caches]
    with interpreted():
        layers = [StackLayer(cache, jnp.int32(1)) for cache in hidden]
        got = cached_attention(q, *layers, jnp.int32(start), implementation="triton", **form)
    assert np.isfinite(np.asarray(got, np.float32)).all()
    own = cached_attention(q, *(cache[1] for cache in caches), start, implementation="xla", **form)
    exact = [x.astype(jnp.float32) for x in (q, *(cache[1] for cache in caches))]
    true = np.asarray(cached_attention(*exact, start, implementation="xla", **form))
    is_text = (start + np.arange(length) >= np.asarray(first or [0, 0])[:, None])[..., None, None]
    assert np.linalg.norm((got - true) * is_text) <= 1.5 * np.linalg.norm((own - true) * is_text)


@pytest.mark.parametrize(
    ("heads", "half", "capacity", "start", "first", "window", "cap"),
    [
        ((8, 2), 16, 300, 150, [7, 150], None, None),
        ((6, 2), 8, 200, 199, None, 50, 3.0),
        ((4, 4), 16, 64, 0, [0, 0], 1, None),
        ((16, 1), 12, 60, 30, None, None, None),
    ],
)
def test_one_token_goes_into_its_cache_and_attends(
    heads: tuple[int, int],
    half: int,
    capacity: int,
    start: int,
    first: list[int] | None,
    window: int | None,
    cap: float | None,
) -> None:
    """In one launch as in two ops; heads turned whole and in part, caches in one part and in several. What was in the
    token's place is NaN."""
    rng = np.random.default_rng(start)
    (n, kv), width = heads, 32
    qkv = jnp.asarray(rng.standard_normal((2, 1, (n + 2 * kv) * width)), jnp.bfloat16)
    cache = rng.standard_normal((2, 3, 2, capacity, kv, width))
    cache[:, :, :, start:] = np.nan
    keys, values = (StackLayer(jnp.asarray(some, jnp.bfloat16), jnp.int32(1)) for some in cache)
    angles = rng.standard_normal((2, 1, half))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    begin = None if first is None else jnp.asarray(first, jnp.int32)
    form: Any = {"heads": n, "first": begin, "window": window, "cap": cap}
    with interpreted():
        out, *stacks = attention_into_cache(
            qkv, cos, sin, keys, values, jnp.int32(start), implementation="triton", **form
        )
    own, *theirs = attention_into_cache(qkv, cos, sin, keys, values, jnp.int32(start), implementation="apart", **form)
    for got, wanted in zip(stacks, theirs, strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))
    whole = out.joined() if isinstance(out, AttentionParts) else out
    assert isinstance(out, AttentionParts) == (capacity > 64)
    seen = [jnp.nan_to_num(stack[1].astype(jnp.float32)) for stack in theirs]
    q = split_rope(qkv, cos, sin, heads=n, kv_heads=kv)[0].astype(jnp.float32)
    true = np.asarray(cached_attention(q, *seen, start, first=begin, window=window, cap=cap, implementation="xla"))
    clean = [StackLayer(jnp.nan_to_num(stack), 1) for stack in theirs]
    q16 = q.astype(jnp.bfloat16)
    own = cached_attention(q16, *clean, start, first=begin, window=window, cap=cap, implementation="xla")
    error = np.linalg.norm(np.asarray(whole, np.float32).reshape(true.shape) - true)
    assert error <= 1.5 * np.linalg.norm(np.asarray(own, np.float32) - true)


def test_one_token_lowers_for_a_gpu() -> None:
    qkv, cache, angles = jnp.zeros((1, 1, 12 * 128), jnp.bfloat16), jnp.zeros((3, 1, 512, 2, 128), jnp.bfloat16), 64

    def step(qkv: Any, k: Any, v: Any, cos: Any, start: Any) -> Any:
        layers = [StackLayer(each, jnp.int32(2)) for each in (k, v)]
        return attention_into_cache(qkv, cos, cos, *layers, start, heads=8, implementation="triton")

    text = lower_for_cuda(step, qkv, cache, cache, jnp.zeros((1, 1, angles)), jnp.int32(7))
    assert text.count('name = "cached_attention"') == 1
    assert "rope_into_cache" not in text


@pytest.mark.parametrize("length", [1, 70])
def test_cached_attention_lowers_for_a_gpu(length: int) -> None:
    q, cache = jnp.zeros((2, length, 8, 128), jnp.bfloat16), jnp.zeros((3, 2, 512, 2, 128), jnp.bfloat16)

    def step(q: Any, k: Any, v: Any, start: Any) -> Any:
        layers = [StackLayer(each, jnp.int32(2)) for each in (k, v)]
        return cached_attention(q, *layers, start, cap=30.0, window=100, implementation="triton")

    assert "cached_attention" in lower_for_cuda(step, q, cache, cache, jnp.int32(7))
