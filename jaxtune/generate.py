"""Greedy generation from the frozen weights and an adapter: one prefill, then a token at a time from a KV cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import Cache, Tree, hidden_states, logits

PROMPT_BUCKET = 64


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """A KV cache for `length` tokens: {"k", "v"}: [L, B, S, K, H]."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


@partial(jax.jit, static_argnames=("config", "adaptation", "dtype", "max_new_tokens", "stop_ids"))
def _generate(
    frozen: Tree,
    lora: Tree,
    prompt: Array,
    prompt_length: Array,
    config: DecoderConfig,
    adaptation: Adaptation,
    dtype: Any,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> tuple[Array, Array]:
    """New tokens [max_new_tokens] and how many of them count; `prompt` is [bucket], padded behind prompt_length."""

    def run(tokens: Array, positions: Array, cache: Cache, start: Array) -> tuple[Array, Cache]:
        hidden, cache_after = hidden_states(
            frozen, lora, tokens, positions, None, config, adaptation, dtype=dtype, cache=cache, cache_start=start
        )
        assert cache_after is not None
        return hidden, cache_after

    bucket = prompt.shape[0]
    cache = empty_cache(config, 1, bucket + max_new_tokens, dtype)
    # The padding behind the prompt is written into the cache too; each new token overwrites its slot before it is seen.
    hidden, cache = run(prompt[None], jnp.arange(bucket)[None], cache, jnp.int32(0))
    last = lax.dynamic_slice_in_dim(hidden, prompt_length - 1, 1, axis=1)
    first = jnp.argmax(logits(frozen, last)[0, 0]).astype(jnp.int32)

    def unfinished(carry: tuple[Array, Array, Cache]) -> Array:
        count, tokens, _ = carry
        stopped = jnp.isin(tokens[count - 1], jnp.array(stop_ids, jnp.int32)) if stop_ids else False
        return (count < max_new_tokens) & jnp.logical_not(stopped)

    def one_more(carry: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        count, tokens, cache = carry
        at = prompt_length + count - 1
        hidden, cache = run(tokens[count - 1][None, None], at[None, None], cache, at)
        token = jnp.argmax(logits(frozen, hidden)[0, 0]).astype(jnp.int32)
        return count + 1, tokens.at[count].set(token), cache

    tokens = jnp.zeros((max_new_tokens,), jnp.int32).at[0].set(first)
    count, tokens, _ = lax.while_loop(unfinished, one_more, (jnp.int32(1), tokens, cache))
    return tokens, count


def generate(
    frozen: Tree,
    lora: Tree,
    prompt_ids: list[int],
    config: DecoderConfig,
    adaptation: Adaptation,
    *,
    dtype: Any,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
) -> list[int]:
    """The most likely continuation of `prompt_ids`, token by token, up to and without the first of `stop_ids`.

    Prompts are padded to a multiple of 64 tokens, so that prompts of similar length share one compiled program.

    Raises:
        ValueError: the prompt is empty or max_new_tokens is not positive.
    """
    if not prompt_ids or max_new_tokens < 1:
        raise ValueError(
            f"generate: needs a prompt and max_new_tokens >= 1, got {len(prompt_ids)} tokens and {max_new_tokens}"
        )
    padded = np.zeros(-(-len(prompt_ids) // PROMPT_BUCKET) * PROMPT_BUCKET, np.int32)
    padded[: len(prompt_ids)] = prompt_ids
    length = jnp.int32(len(prompt_ids))
    tokens, count = _generate(frozen, lora, padded, length, config, adaptation, dtype, max_new_tokens, stop_ids)
    new = np.asarray(tokens)[: int(count)].tolist()
    return new[:-1] if new[-1] in stop_ids else new
