"""Attention through Mosaic: in JAX's GPU interpreter against float32 truth, and lowered for a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._device import assume_capability, lower_for_cuda
from pallas_kernels._dispatch import record_choices
from pallas_kernels._triton import interpreted
from pallas_kernels.attention import attention, mosaic_parts

needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused by name, which is tested below")


def gradients(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, **form: Any) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda *inputs: attention(*inputs, **form), q, k, v)
    return y, *pull(dy)


@needs_jax_0_11
@pytest.mark.parametrize(
    ("width", "window", "cap"), [(64, None, None), (64, 70, 2.0), (192, None, 2.0), (256, 70, None)]
)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, width: int, window: int | None, cap: float | None
) -> None:
    """Documents that end within tiles, padding, two heads for each of the keys', and rows that fill no tile."""
    monkeypatch.setattr(mosaic_parts, "multiprocessors", lambda: 2)
    t = 195
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.standard_normal((1, t, heads, width)), jnp.bfloat16) for heads in (4, 2, 2, 4))
    cuts = [t // 6, t // 6 + 1, t // 2, t - 3]
    segments = jnp.asarray((np.searchsorted(cuts, np.arange(t), side="right") + 1)[None] % 5, jnp.int32)
    form: Any = {"segment_ids": segments, "window": window, "cap": cap}
    with interpreted():
        ours = gradients(q, k, v, dy, implementation="mosaic", **form)
    own = gradients(q, k, v, dy, implementation="xla", **form)
    true = gradients(*(x.astype(jnp.float32) for x in (q, k, v, dy)), implementation="xla", **form)
    for got, theirs, wanted in zip(ours, own, true, strict=True):
        limit = 1.5 * np.linalg.norm(np.asarray(theirs, np.float32) - wanted)
        assert np.linalg.norm(np.asarray(got, np.float32) - wanted) <= limit


@needs_jax_0_11
@pytest.mark.parametrize(
    ("heads", "width", "packed", "window", "cap"),
    [
        ((32, 8), 128, True, None, None),
        ((32, 8), 128, False, 1000, None),
        ((8, 4), 256, True, None, 50.0),
        ((9, 3), 64, False, None, None),
    ],
)
def test_lowers_to_cuda(
    heads: tuple[int, int], width: int, packed: bool, window: int | None, cap: float | None
) -> None:
    q, k = (jax.ShapeDtypeStruct((2, 2048, n, width), jnp.bfloat16) for n in heads)
    segments = jax.ShapeDtypeStruct((2, 2048), jnp.int32) if packed else None

    def step(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return gradients(q, k, v, q, segment_ids=segments, window=window, cap=cap, implementation="mosaic")

    assert "mosaic_gpu" in lower_for_cuda(step, q, k, k, segments)


def test_choice_and_reasons() -> None:
    """The first choice where it has been timed; elsewhere refused in words, or not the first."""
    q = jax.ShapeDtypeStruct((1, 64, 4, 128), jnp.bfloat16)
    old = jax.__version_info__ < (0, 11)

    def chosen(capability: float, width: int, packed: bool = True, cap: float | None = None) -> str:
        shape = jax.ShapeDtypeStruct((1, 64, 4, width), jnp.bfloat16)
        documents = jnp.zeros((1, 64), jnp.int32) if packed else None
        with assume_capability(capability), record_choices("xla") as choices:
            jax.eval_shape(lambda q: attention(q, q, q, segment_ids=documents, cap=cap), shape)
        return choices[0].implementation

    ours = "triton" if old else "mosaic"
    assert [chosen(9.0, 128), chosen(9.0, 256), chosen(8.9, 128)] == [ours, ours, "triton"]
    assert [chosen(9.0, 256, False), chosen(9.0, 256, False, 50.0)] == ["cudnn", ours]
    for shape, dtype, reason in [
        (q.shape, jnp.float32, "bfloat16 and float16"),
        ((1, 64, 4, 80), jnp.bfloat16, "multiples of 64"),
        (q.shape, jnp.bfloat16, "JAX 0.11" if old else "Hopper"),
    ]:
        x = jnp.zeros(shape, dtype)
        with pytest.raises(NotImplementedError, match=reason):
            attention(x, x, x, implementation="mosaic")
