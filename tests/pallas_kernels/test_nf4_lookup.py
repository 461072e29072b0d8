"""Byte permutes against the table that stands for them in the interpreter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx import run_ptx

from pallas_kernels.nf4.reference import NF4_TABLE
from pallas_kernels.nf4_matmul import lookup

CODES = np.arange(256, dtype=np.uint8).reshape(64, 4)


def words(monkeypatch: pytest.MonkeyPatch, dtype: str, for_sums: bool) -> list[np.ndarray]:
    """The values that a kernel gets from its assembly."""

    def assembly(text: str, codes: jax.Array) -> jax.Array:
        out = run_ptx(text, np.ascontiguousarray(codes).view(np.uint32)[:, 0])
        return jnp.asarray(np.stack(out, axis=-1).view(np.int32))

    monkeypatch.setattr(lookup, "_assembly", assembly)
    return [np.asarray(v) for v in lookup.table_values(CODES, None, jnp.dtype(dtype), for_sums=for_sums)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("for_sums", [False, True])
def test_permutes_give_the_values_of_the_table(monkeypatch: pytest.MonkeyPatch, dtype: str, for_sums: bool) -> None:
    table = lookup.table_of(jnp.dtype(dtype), for_sums=for_sums)
    for values, nibbles in zip(words(monkeypatch, dtype, for_sums), (CODES >> 4, CODES & 15), strict=True):
        assert values.dtype == ("float32" if for_sums else dtype)
        np.testing.assert_array_equal(values.astype(np.float32), table[nibbles])


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
@pytest.mark.parametrize("for_sums", [False, True])
def test_tables_are_as_exact_as_their_dtype(dtype: str, bits: int, for_sums: bool) -> None:
    table = lookup.table_of(jnp.dtype(dtype), for_sums=for_sums)
    # A repetition's lower half is what it is, so the nearest one may be a whole unit in the last place away.
    limit = 2.0**-bits * (2 if for_sums and dtype == "bfloat16" else 1)
    assert (np.abs(table - NF4_TABLE) <= limit * np.abs(NF4_TABLE)).all()
