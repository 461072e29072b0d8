"""Is an implementation right: its error beside that of the definition computed in the same dtypes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# What a single number may be off by, where the definition's own error is luck; what codes may be, of which one in some
# thousands lies so near to a boundary that rounding moves it by one in about a hundred; and the order of float32 sums.
_SCALAR_FLOOR, _CODE_FLOOR, _FLOAT32_FLOOR = 2.0**-11, 2e-4, 2e-5


def relative_errors(results: Any, truth: Any) -> Array:
    """|result - truth| / |truth| in the Euclidean norm, for each array of the results; NaN stays NaN."""

    def error(result: Array, true: Array) -> Array:
        result, true = result.astype(jnp.float32), true.astype(jnp.float32)
        return jnp.linalg.norm((result - true).ravel()) / jnp.maximum(jnp.linalg.norm(true.ravel()), 1e-30)

    return jnp.stack([error(*pair) for pair in zip(jax.tree.leaves(results), jax.tree.leaves(truth), strict=True)])


def bounds(own: list[float], results: list[Array]) -> list[float]:
    """The error that each array may have: 1.5 times the definition's own."""

    def floor(result: Array) -> float:
        if jnp.issubdtype(result.dtype, jnp.integer):
            return _CODE_FLOOR
        return _FLOAT32_FLOOR if result.shape else _SCALAR_FLOOR

    return [max(1.5 * error, floor(result)) for error, result in zip(own, results, strict=True)]


def verdict(errors: list[float], bound: list[float]) -> str | None:
    """What is wrong, or None."""
    for index, (error, limit) in enumerate(zip(errors, bound, strict=True)):
        if not error <= limit:
            return f"result {index} of {len(errors)} is off by {error:.2e}, and {limit:.2e} is allowed"
    return None
