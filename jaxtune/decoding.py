"""Generation on the device: the prompts go through in chunks, then many tokens a dispatch from a KV cache.

Rows are padded in front, so that all of them end at the same index of the cache: the next token's place is one number.
For a cache of one length, a program is compiled for each prompt bucket (64, 128, 256 or 512 tokens; longer prompts go
through in chunks of 512) and one for the tokens that follow.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from jaxtune.errors import UserError
from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.models.context import Cache, Execution, Past
from jaxtune.models.decoder import Tree, hidden_states, logits
from jaxtune.sampling import Sampling, next_tokens

log = logging.getLogger(__name__)

LEAST_CHUNK, CHUNK = 64, 512
CACHE_MULTIPLE = 256
# Of an MLP's width, in a chunk: so that about as much of its weights is decoded at once as of attention's. Few tokens
# are multiplied by packed weights.
SLICES = 4
# Tokens of one dispatch: at most this many, and fewer while a dispatch takes longer than a reader would wait.
MOST_STEPS, PATIENCE_SECONDS = 32, 0.05

GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What goes from dispatch to dispatch, in place.

    cache: {"k", "v"}: [L, B, S, K, H]. end: int32, tokens in it, padding included. first: int32 [B], where each row's
    own begin. logits: float32 [B, V], of the next token. finished: bool [B]. count: int32, new tokens so far. seen:
    bool [B, V], tokens of prompt and answer, or None where no penalty asks for them.
    """

    cache: Cache
    end: Array
    first: Array
    logits: Array
    finished: Array
    count: Array
    seen: Array | None


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model that continues token ids: its two parameter trees and how they are computed.

    frozen, lora: see CONTRIBUTING; `lora` may be {}. decoder, adaptation, dtype: as in training.
    unroll: one program for all layers of a token instead of a loop over one layer's, which takes longer to compile.
    """

    frozen: Tree
    lora: Tree
    decoder: DecoderConfig
    adaptation: Adaptation
    dtype: Any
    unroll: bool = False

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        keep_stop: bool = False,
        room: int = 0,
    ) -> Iterator[list[list[int]]]:
        """Continue a batch of prompts of any lengths; yields each row's new tokens, one or more dispatch by dispatch.

        A row ends before the first of `stop_ids`, with `keep_stop` behind it, and gives empty lists from then on; the
        iteration ends with the last row, or after max_new_tokens. `room`: tokens that the cache has room for at least,
        so that calls of many lengths share their programs.

        Raises:
            UserError: no prompt, a prompt without tokens or with ids outside of the vocabulary, or max_new_tokens
                below 1.
        """
        self._check(prompts, max_new_tokens)
        # Once, and not for every token: the products cast it anyway.
        lora = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), self.lora)
        state = self._prefill(lora, prompts, max_new_tokens, sampling, room)
        settings, key = sampling.values(), jax.random.key(sampling.seed)
        stops = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
        alive, done, steps = [True] * len(prompts), 0, 1
        # One dispatch is computed while the one before it is read; where all rows have ended it makes nothing.
        flight: deque[tuple[Array, Array]] = deque()
        sent, started = 0, time.perf_counter()
        while any(alive) and done < max_new_tokens:
            while sent < max_new_tokens and len(flight) < 2:
                limit = min(steps, max_new_tokens - sent)
                state, *made_there = decode(
                    self.frozen,
                    lora,
                    state,
                    settings,
                    key,
                    stops,
                    limit,
                    self.decoder,
                    self.adaptation,
                    self.dtype,
                    self.unroll,
                )
                flight.append((made_there[0], made_there[1]))
                sent += limit
            tokens, count = flight.popleft()
            made = np.asarray(tokens)[:, : int(count)]
            done += made.shape[1]
            rows = []
            for row, new in enumerate(made.tolist()):
                stop = next((at for at, token in enumerate(new) if token in stop_ids), None)
                end = stop if stop is None or not keep_stop else stop + 1
                rows.append(new[:end] if alive[row] else [])
                alive[row] = alive[row] and stop is None
            yield rows
            now = time.perf_counter()
            if now - started < PATIENCE_SECONDS:
                steps = min(2 * steps, MOST_STEPS)
            started = now

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        room: int = 0,
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to and without the first of `stop_ids`; see `stream`."""
        rows: list[list[int]] = [[] for _ in prompts]
        settings: Any = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop_ids": stop_ids, "room": room}
        for news in self.stream(prompts, **settings):
            for row, new in zip(rows, news):
                row += new
        return rows

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not prompts or min(map(len, prompts)) == 0 or max_new_tokens < 1:
            raise UserError(
                f"generate: needs prompts of one token or more and max_new_tokens >= 1, got prompts of "
                f"{[len(prompt) for prompt in prompts]} tokens and max_new_tokens {max_new_tokens}"
            )
        outside = {token for prompt in prompts for token in prompt if not 0 <= token < self.decoder.vocab_size}
        if outside:
            raise UserError(
                f"generate: token ids {sorted(outside)[:5]} are outside of the vocabulary, which has "
                f"{self.decoder.vocab_size} entries; use the model's own tokenizer"
            )
        length = max(map(len, prompts)) + max_new_tokens
        if length > self.decoder.max_position:
            log.warning("%d tokens go beyond the model's context of %d", length, self.decoder.max_position)

    def _prefill(
        self, lora: Tree, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, room: int
    ) -> State:
        """The state after the prompts."""
        batch, length = len(prompts), padded_length(max(map(len, prompts)))
        tokens = np.zeros((batch, length), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[length - len(prompt) :] = prompt
        first = jnp.asarray([length - len(prompt) for prompt in prompts], jnp.int32)
        capacity = -(-max(length + max_new_tokens, room) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        cache, next_logits = empty_cache(self.decoder, batch, capacity, self.dtype), None
        chunk = min(length, CHUNK)
        for start in range(0, length, chunk):
            part = tokens[:, start : start + chunk]
            cache, next_logits = prefill_chunk(
                self.frozen, lora, cache, part, start, first, self.decoder, self.adaptation, self.dtype
            )
        assert next_logits is not None
        seen = None
        if "repetition_penalty" in sampling.values():
            marks = np.zeros((batch, self.decoder.vocab_size), bool)
            for row, prompt in zip(marks, prompts):
                row[list(prompt)] = True
            seen = jnp.asarray(marks)
        finished = jnp.zeros(batch, bool)
        return State(cache, jnp.int32(length), first, next_logits, finished, jnp.int32(0), seen)


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """A KV cache for `length` tokens: {"k", "v"}: [L, B, S, K, H]."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def padded_length(tokens: int) -> int:
    """The bucket of a prompt: the next power of two from 64 to 512, above that the next multiple of 512."""
    if tokens > CHUNK:
        return -(-tokens // CHUNK) * CHUNK
    return max(LEAST_CHUNK, 1 << (tokens - 1).bit_length())


def _forward(
    frozen: Tree,
    lora: Tree,
    tokens: Int[Array, "B T"],
    cache: Cache,
    start: Array,
    first: Array,
    *computed: Any,
    unroll: bool = False,
) -> tuple[Cache, Array]:
    """Run tokens that stand at index `start` of the cache; the cache after them, and the last one's logits [B, V]."""
    config, adaptation, dtype = computed
    # Padding has no position of its own; nothing sees it.
    positions = jnp.maximum(start + jnp.arange(tokens.shape[1]) - first[:, None], 0)
    hidden, cache_after = hidden_states(
        frozen,
        lora,
        tokens,
        positions,
        None,
        config,
        adaptation,
        dtype=dtype,
        execution=Execution(unroll=unroll, mlp_slices=SLICES if tokens.size > LEAST_CHUNK else 1),
        past=Past(cache, start, first),
    )
    assert cache_after is not None
    return cache_after, logits(frozen, hidden[:, -1:], config)[:, 0]


@partial(jax.jit, static_argnums=(6, 7, 8), donate_argnums=2)
def prefill_chunk(
    frozen: Tree,
    lora: Tree,
    cache: Cache,
    tokens: Array,
    start: Array,
    first: Array,
    config: DecoderConfig,
    adaptation: Adaptation,
    dtype: Any,
) -> tuple[Cache, Array]:
    return _forward(frozen, lora, tokens, cache, start, first, config, adaptation, dtype)


@partial(jax.jit, static_argnums=(7, 8, 9, 10), donate_argnums=2)
def decode(
    frozen: Tree,
    lora: Tree,
    state: State,
    settings: dict[str, Array],
    key: Array,
    stops: Array,
    limit: Array,
    config: DecoderConfig,
    adaptation: Adaptation,
    dtype: Any,
    unroll: bool = False,
) -> tuple[State, Array, Array]:
    """Up to `limit` tokens of each row, fewer where all rows have finished: [B, MOST_STEPS], and how many count."""
    rows = jnp.arange(state.first.shape[0])

    def unfinished(carry: tuple[State, Array, Array]) -> Array:
        state, _, made = carry
        return (made < limit) & ~jnp.all(state.finished)

    def one_more(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, tokens, made = carry
        new = next_tokens(state.logits, settings, state.seen, jax.random.fold_in(key, state.count))
        seen = None if state.seen is None else state.seen.at[rows, new].set(True)
        cache, next_logits = _forward(
            frozen, lora, new[:, None], state.cache, state.end, state.first, config, adaptation, dtype, unroll=unroll
        )
        finished = state.finished | jnp.isin(new, stops)
        state = State(cache, state.end + 1, state.first, next_logits, finished, state.count + 1, seen)
        return state, tokens.at[:, made].set(new), made + 1

    tokens = jnp.zeros((rows.size, MOST_STEPS), jnp.int32)
    return lax.while_loop(unfinished, one_more, (state, tokens, jnp.int32(0)))
