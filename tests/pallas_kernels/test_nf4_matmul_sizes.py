"""Products with a packed weight from one row to 32,768, for weights whose sides no tile divides."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._triton import interpreted
from pallas_kernels.nf4 import dequantize, quantize
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.reference import nf4_matmul_reference

SAMPLED = np.random.default_rng(11)
# Both ends, the edges of what is fused, and one drawn at random between each pair of them.
ENDS = [1, 16, 17, 64, 65, 2049, 32768]
ROWS = sorted({*ENDS, *(int(SAMPLED.integers(a, b + 1)) for a, b in itertools.pairwise(ENDS))})
# (out, in): rows of whole blocks, but no whole tiles; and rows that are no whole blocks, which XLA alone decodes.
WEIGHTS = [(37, 320), (19, 192), (29, 101)]


@pytest.mark.parametrize("m", ROWS)
def test_any_number_of_rows(m: int) -> None:
    n, k = WEIGHTS[m % len(WEIGHTS)]
    rng = np.random.default_rng(m)
    w = quantize(jnp.asarray(rng.standard_normal((n, k)) / k**0.5, jnp.bfloat16))
    x, dy = (jnp.asarray(rng.standard_normal((m, width), np.float32), jnp.bfloat16) for width in (k, n))
    weight = np.asarray(dequantize(dataclasses.replace(w, dtype="float32")), np.float64)
    truth = np.asarray(x, np.float64) @ weight.T, np.asarray(dy, np.float64) @ weight

    def results(matmul: object) -> tuple[np.ndarray, ...]:
        y, pull = jax.vjp(lambda x: matmul(x, w), x)
        return tuple(np.asarray(v, np.float64) for v in (y, pull(dy)[0]))

    own = results(nf4_matmul_reference)
    for name in ("xla", "triton") if k % 64 == 0 else ("xla",):
        with interpreted():
            got = results(lambda x, w, name=name: nf4_matmul(x, w, name))
        for ours, theirs, true in zip(got, own, truth, strict=True):
            # Results of a few elements may by luck be nearer to the truth than any rounding to bfloat16 promises.
            limit = max(1.5 * np.linalg.norm(theirs - true), 2.0**-8 * np.linalg.norm(true))
            assert np.linalg.norm(ours - true) <= limit, (name, ours.shape)
