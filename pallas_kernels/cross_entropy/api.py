"""Head and cross-entropy: the public function."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels._dispatch import choose
from pallas_kernels.cross_entropy import head as head_products
from pallas_kernels.cross_entropy.head import Head, Int8Head
from pallas_kernels.cross_entropy.triton import unsupported_reason as softmax_reason
from pallas_kernels.cross_entropy.xla import Form, Vocabulary, linear_cross_entropy_xla
from pallas_kernels.nf4 import NF4Tensor
from pallas_kernels.nf4_matmul import mosaic_few, triton

LOGITS_BUDGET_BYTES = 256 * 2**20


def chunk_tokens(vocab_size: int, budget_bytes: int = LOGITS_BUDGET_BYTES) -> int:
    """Tokens whose float32 logits fit the budget: a power of two, at least 16."""
    fits = max(16, budget_bytes // (4 * vocab_size))
    return 1 << (fits.bit_length() - 1)


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    *,
    ignore_index: int | None = None,
    cap: float | None = None,
    logit_scale: float = 1.0,
    train_head: bool = False,
    chunk: int | None = None,
    budget_bytes: int = LOGITS_BUDGET_BYTES,
    vocabulary: Vocabulary | None = None,
    implementation: str | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log softmax(hidden head^T)[target]; only one chunk's logits exist at a time.

    Differentiable in `hidden`, and with `train_head` in a dense head. The gradients are made with the loss.

    Args:
        hidden: [B, T, D], the dtype that products are computed in.
        head: [V, D], cast to it; or one NF4 weight of that shape, or an `Int8Head` (see `quantize_head`), of which some
            rows at a time are decoded.
        targets: int32 [B, T], values in [0, V), or ignore_index.
        weights: float32 [B, T], 0 where a token is not learnt; None for 1 each.
        ignore_index: target of tokens that are not learnt, whatever their weight; None where there is none.
        cap: soft-cap of the logits, cap * tanh(logits / cap); None for none. logit_scale: factor on the logits, before
            their soft-cap.
        train_head: make the head's gradient too, in its dtype; it is summed in float32, an array of the head's size.
        chunk: tokens whose logits may exist at once, over all rows; None takes what `budget_bytes` of float32 logits
            hold. Beside them there is their gradient, in hidden's dtype.
        vocabulary: inside of a `shard_map`, how the head's rows lie on its devices: `head` is then this device's part
            of it, and hidden, targets and weights are this device's rows, of the same shape on all.
        implementation: of the softmax, "triton", "xla", or None to choose; the products are XLA's.

    Returns:
        The weighted sum, float32.

    Raises:
        ValueError: shapes do not fit together, the cap is not positive, or a head that is not dense is to be trained.
        NotImplementedError: a packed head whose rows are not whole blocks, or the named implementation cannot run.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"linear_cross_entropy: cap is {cap}; pass a positive number, or None for no soft-cap")
    if train_head and isinstance(head, NF4Tensor | Int8Head):
        raise ValueError(f"linear_cross_entropy: a {type(head).__name__} has no gradient; train a dense head")
    b, t, d = hidden.shape
    if isinstance(head, NF4Tensor) and head.stack_shape:
        raise ValueError(f"linear_cross_entropy: head is a stack {head.stack_shape} of packed weights; take one")
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    if head.shape[1:] != (d,) or targets.shape != (b, t) or weights.shape != (b, t):
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape}, head {head.shape}, targets {targets.shape}, "
            f"weights {weights.shape} must be [B, T, D], [V, D], [B, T], [B, T]"
        )
    if ignore_index is not None:
        ignored = targets == ignore_index
        targets, weights = jnp.where(ignored, 0, targets), jnp.where(ignored, 0.0, weights)
    visiting = b if vocabulary is None or vocabulary.tokens is None else b * lax.axis_size(vocabulary.tokens)
    per_row = max(1, min(t, (chunk or chunk_tokens(head.shape[0], budget_bytes)) // visiting))
    softmax = {
        "triton": lambda: softmax_reason(visiting * per_row * head.shape[0], vocabulary is not None),
        "xla": lambda: None,
    }
    chosen = choose("linear_cross_entropy", implementation, softmax)
    form = Form(per_row, cap, logit_scale, train_head, vocabulary, chosen)
    return linear_cross_entropy_xla(hidden, head, targets, weights, form)


def head_logits(hidden: Float[Array, "B T D"], head: Head, implementation: str | None = None) -> Float[Array, "B T V"]:
    """float32 hidden head^T, without a loss: for generation, where few tokens are asked about.

    Args:
        hidden: [B, T, D], the dtype that products are computed in.
        head: as for `linear_cross_entropy`; one in 8 or 4 bits is never decoded whole.
        implementation: of an NF4 head: "mosaic", "triton", "xla", or None to choose.

    Raises:
        NotImplementedError: a packed head whose rows are not whole blocks, or the named implementation cannot run.
    """
    if not isinstance(head, NF4Tensor):
        return head_products.logits(hidden, head_products.prepared(head, hidden.dtype))
    rows = hidden.reshape(-1, hidden.shape[-1])

    def too_many() -> str | None:
        reason = triton.unsupported_reason(rows, head)
        return reason if reason or triton.can_fuse(rows, head) else f"{rows.shape[0]} rows of {rows.dtype} are too many"

    candidates = {
        "mosaic": lambda: mosaic_few.unsupported_reason(rows, [head]),
        "triton": too_many,
        "xla": lambda: None,
    }
    chosen = choose("head_logits", implementation, candidates)
    if chosen == "mosaic":
        return mosaic_few.few_rows(rows, [head], dtype=jnp.float32).reshape(*hidden.shape[:2], -1)
    if chosen == "triton":
        return triton.fused_product(rows, head, jnp.float32).reshape(*hidden.shape[:2], -1)
    return head_products.logits(hidden, head_products.prepared(head, hidden.dtype))
