"""Head and cross-entropy: the public function."""

from __future__ import annotations

from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels._dispatch import choose
from pallas_kernels.cross_entropy.xla import Vocabulary, linear_cross_entropy_xla
from pallas_kernels.nf4 import NF4Tensor

LOGITS_BUDGET_BYTES = 256 * 2**20


def chunk_tokens(vocab_size: int, budget_bytes: int = LOGITS_BUDGET_BYTES) -> int:
    """Tokens whose float32 logits fit the budget: a power of two, at least 16."""
    fits = max(16, budget_bytes // (4 * vocab_size))
    return 1 << (fits.bit_length() - 1)


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | NF4Tensor,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    cap: float | None = None,
    chunk: int | None = None,
    vocabulary: Vocabulary | None = None,
    implementation: str | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log softmax(hidden head^T)[target]; only one chunk's logits exist at a time.

    Differentiable in `hidden` only: the head is frozen and no gradient is made for it.

    Args:
        hidden: [B, T, D], the dtype that products are computed in. head: [V, D], cast to it; or one packed weight of
            that shape, of which some rows at a time are decoded.
        targets: int32 [B, T], values in [0, V). weights: float32 [B, T], 0 where a token is not learnt.
        cap: soft-cap of the logits, cap * tanh(logits / cap); None for none.
        chunk: tokens whose logits may exist at once, over all rows; None takes what 256 MiB of float32 logits hold.
        vocabulary: inside of a `shard_map`, how the head's rows lie on its devices: `head` is then this device's part
            of it, and hidden, targets and weights are this device's rows, of the same shape on all.
        implementation: "xla", or None to choose.

    Returns:
        The weighted sum, float32.

    Raises:
        ValueError: shapes do not fit together, or the cap is not positive.
        NotImplementedError: a packed head whose rows are not whole blocks.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"linear_cross_entropy: cap is {cap}; pass a positive number, or None for no soft-cap")
    b, t, d = hidden.shape
    if isinstance(head, NF4Tensor) and head.stack_shape:
        raise ValueError(f"linear_cross_entropy: head is a stack {head.stack_shape} of packed weights; take one")
    if head.shape[1:] != (d,) or targets.shape != (b, t) or weights.shape != (b, t):
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape}, head {head.shape}, targets {targets.shape}, "
            f"weights {weights.shape} must be [B, T, D], [V, D], [B, T], [B, T]"
        )
    choose("linear_cross_entropy", implementation, {"xla": lambda: None})
    visiting = b if vocabulary is None or vocabulary.tokens is None else b * lax.axis_size(vocabulary.tokens)
    per_row = max(1, min(t, (chunk or chunk_tokens(head.shape[0])) // visiting))
    head = head if isinstance(head, NF4Tensor) else head.astype(hidden.dtype)
    return linear_cross_entropy_xla(hidden, head, targets, weights, per_row, cap, vocabulary)
