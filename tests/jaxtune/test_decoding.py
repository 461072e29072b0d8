"""Generation from the cache against the whole model run anew for each token."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoder_config, frozen_tree, lora_tree, random_documents

from jaxtune import decoding
from jaxtune.config import LoraConfig
from jaxtune.decoding import Generator, decode, empty_cache, padded_length, prefill_chunk
from jaxtune.errors import UserError
from jaxtune.host_embedding import with_table_on_host
from jaxtune.lora import adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import embed, hidden_states, logits
from jaxtune.sampling import Sampling
from pallas_kernels._device import lower_for_cuda
from pallas_kernels._triton import interpreted
from pallas_kernels.nf4 import quantize

LORA = LoraConfig(r=4, lora_alpha=16)
CONFIG = decoder_config()


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make_generator(CONFIG)


def make_generator(config: DecoderConfig, dtype: Any = jnp.float32, *, packed_head: bool = False) -> Generator:
    frozen = frozen_tree(config, dtype=dtype)
    if packed_head:
        frozen["lm_head"]["kernel"] = quantize(frozen["lm_head"]["kernel"])
    return Generator(frozen, lora_tree(config, LORA), config, adaptation(LORA), jnp.dtype(dtype))


def without_cache(generator: Generator, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the definition: the whole text through the model for each token."""
    room = len(prompt) + count

    @jax.jit
    def run(frozen: Any, lora: Any, tokens: Any) -> Any:
        hidden, _ = hidden_states(
            frozen,
            lora,
            tokens,
            jnp.arange(room)[None],
            None,
            generator.decoder,
            generator.adaptation,
            dtype=generator.dtype,
        )
        return logits(frozen, hidden, generator.decoder)[0]

    text = list(prompt)
    while len(text) < room:
        padded = jnp.asarray([text + [0] * (room - len(text))], jnp.int32)
        text.append(int(jnp.argmax(run(generator.frozen, generator.lora, padded)[len(text) - 1])))
    return text[len(prompt) :]


def test_ragged_batch(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every kind in one batch, through several chunks and dispatches: each as if it were alone."""
    monkeypatch.setattr(decoding, "CHUNK", 64)
    prompts = random_documents(CONFIG, [1, 130, 64, 17])
    assert padded_length(130) == 192
    answers = generator.generate(prompts, max_new_tokens=40)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == without_cache(generator, prompt, 40)


def test_tied_head_and_bfloat16() -> None:
    """bfloat16 rounds, so near ties may flip: the first token of each row, and finite logits throughout."""
    generator = make_generator(decoder_config(tie_word_embeddings=True), jnp.bfloat16)
    prompts = random_documents(CONFIG, [9, 70])
    answers = generator.generate(prompts, max_new_tokens=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer[:1] == without_cache(generator, prompt, 1)


def test_a_packed_head() -> None:
    generator = make_generator(decoder_config(hidden_size=64), packed_head=True)
    prompts = random_documents(CONFIG, [9, 70])
    answers = generator.generate(prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == without_cache(generator, prompt, 5)


def test_stop_tokens(generator: Generator) -> None:
    """Rows end by themselves, before the stop token; with the last of them the iteration ends."""
    prompts = random_documents(CONFIG, [5, 12, 30])
    free = generator.generate(prompts, max_new_tokens=24)
    stops = (free[0][2], free[1][9])
    ended = generator.generate(prompts, max_new_tokens=24, stop_ids=stops)
    for whole, cut in zip(free, ended, strict=True):
        ends = [at for at, token in enumerate(whole) if token in stops]
        assert cut == whole[: min(ends, default=None)]
    first_row = generator.stream(prompts[:1], max_new_tokens=24, stop_ids=(free[0][0],))
    assert [list(rows) for rows in first_row] == [[[]]]


def test_stream_comes_in_pieces(generator: Generator) -> None:
    prompts = random_documents(CONFIG, [5, 12])
    pieces = list(generator.stream(prompts, max_new_tokens=20))
    assert len(pieces) > 1
    joined = [list(itertools.chain(*row)) for row in zip(*pieces, strict=True)]
    assert joined == generator.generate(prompts, max_new_tokens=20)
    assert [len(row) for row in joined] == [20, 20]


def test_draws_do_not_depend_on_dispatches_or_other_rows(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_documents(CONFIG, [5, 12])
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=11)
    both = generator.generate(prompts, max_new_tokens=12, sampling=sampling)
    monkeypatch.setattr(decoding, "PATIENCE_SECONDS", 0.0)
    assert generator.generate(prompts, max_new_tokens=12, sampling=sampling) == both
    assert generator.generate(prompts[:1], max_new_tokens=12, sampling=sampling) == both[:1]
    assert generator.generate(prompts, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=12)) != both


def test_repetition_penalty_counts_prompt_and_answer(generator: Generator) -> None:
    """A penalty beyond all logits: no token comes twice, and none of the prompt; without it some do."""
    (prompt,) = random_documents(CONFIG, [30])
    sampling = Sampling(repetition_penalty=1e9)
    (answer,) = generator.generate([prompt], max_new_tokens=30, sampling=sampling)
    assert len(set(answer)) == 30
    assert not set(answer) & set(prompt)
    (free,) = generator.generate([prompt], max_new_tokens=30)
    assert len(set(free)) < 30 or set(free) & set(prompt)


def test_programs_are_shared(generator: Generator) -> None:
    """Prompts of one bucket, other lengths of answers and other settings of the same kind compile nothing anew."""
    jax.clear_caches()
    for lengths, new, temperature in (([5, 12], 20, 0.7), ([40, 60], 3, 1.1), ([1, 2], 7, 0.3)):
        prompts = random_documents(CONFIG, lengths)
        generator.generate(prompts, max_new_tokens=new, sampling=Sampling(temperature=temperature))
    counts: list[Any] = [prefill_chunk, decode]
    assert [program._cache_size() for program in counts] == [1, 1]
    # With room for it, so do longer prompts, but for their bucket.
    jax.clear_caches()
    for length, new in ((5, 3), (60, 250), (300, 5), (500, 9)):
        (prompt,) = random_documents(CONFIG, [length])
        (answer,) = generator.generate([prompt], max_new_tokens=new, room=1024)
        assert len(answer) == new
    assert [program._cache_size() for program in counts] == [2, 1]


def test_the_cache_exists_once(generator: Generator) -> None:
    """Both programs write into the cache that they are given: beside it they hold less than a quarter of it."""
    config = decoder_config(hidden_size=64, num_layers=8, num_kv_heads=4, head_dim=16)
    generator = make_generator(config)
    cache = empty_cache(config, 2, 4096, generator.dtype)
    size = sum(leaf.nbytes for leaf in cache.values())
    first, fixed = jnp.zeros(2, jnp.int32), (config, generator.adaptation, generator.dtype)
    prefill: Any = prefill_chunk.lower(
        generator.frozen, generator.lora, cache, np.zeros((2, 8), np.int32), 0, first, *fixed
    ).compile()
    start = decoding.State(
        cache, jnp.int32(8), first, jnp.zeros((2, config.vocab_size)), jnp.zeros(2, bool), jnp.int32(0), None
    )
    key, stops = jax.random.key(0), jnp.zeros(1, jnp.int32)
    loop: Any = decode.lower(generator.frozen, generator.lora, start, {}, key, stops, 8, *fixed).compile()
    for program in (prefill, loop):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size / 4


def test_the_embedding_may_stay_in_host_memory(generator: Generator) -> None:
    """The same tokens; and the table is sliced where it is, so that no copy of it is made."""
    on_host = dataclasses.replace(generator, frozen=with_table_on_host(generator.frozen))
    table = on_host.frozen["embed_tokens"]["embedding"]
    assert table.sharding.memory_kind == "pinned_host"
    prompts = random_documents(CONFIG, [1, 70])
    assert on_host.generate(prompts, max_new_tokens=12) == generator.generate(prompts, max_new_tokens=12)

    def rows(table: Any) -> Any:
        return embed({"embed_tokens": {"embedding": table}}, jnp.ones((2, 3), jnp.int32), CONFIG, jnp.bfloat16)

    np.testing.assert_array_equal(jax.jit(rows)(table), rows(generator.frozen["embed_tokens"]["embedding"]))
    text = jax.jit(rows).lower(table).as_text()
    assert "pinned_host" in text
    assert ("gather" in text, "dynamic_slice" in text) == (False, True)


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 1024), (1025, 1536)])
def test_buckets(tokens: int, bucket: int) -> None:
    assert padded_length(tokens) == bucket


@pytest.mark.parametrize(
    ("prompts", "new", "problem"),
    [
        ([], 5, "needs prompts"),
        ([[1], []], 5, "needs prompts of one token or more"),
        ([[1]], 0, "max_new_tokens >= 1"),
        ([[1, 101]], 5, r"\[101\] are outside of the vocabulary, which has 101"),
        ([[-1]], 5, "outside of the vocabulary"),
    ],
)
def test_what_cannot_be_continued(generator: Generator, prompts: Any, new: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        generator.generate(prompts, max_new_tokens=new)


def test_going_beyond_the_context_is_said(generator: Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generator.generate([[1] * 511], max_new_tokens=2)
    assert "513 tokens go beyond the model's context of 512" in caplog.text


@pytest.mark.parametrize("batch", [1, 16])
def test_on_a_gpu_tokens_are_made_of_packed_weights(batch: int) -> None:
    """Every linear reads its layer in the stack, and so is the head read: none is decoded into memory, and no packed
    byte is copied."""
    config = decoder_config(hidden_size=64, intermediate_size=128, head_dim=16)
    generator = make_generator(config, jnp.bfloat16, packed_head=True)
    cache = empty_cache(config, batch, 256, jnp.bfloat16)
    zeros = jnp.zeros(batch, jnp.int32)
    state = decoding.State(
        cache, jnp.int32(64), zeros, jnp.zeros((batch, config.vocab_size)), zeros > 0, jnp.int32(0), None
    )

    def run(frozen: Any, lora: Any, state: Any) -> Any:
        rest = (jax.random.key(0), zeros[:0], 3, config, generator.adaptation, generator.dtype)
        return decode(frozen, lora, state, {}, *rest)

    text = lower_for_cuda(run, generator.frozen, generator.lora, state)
    # One row takes q, k and v in one launch, and gate and up; the head is one more. From JAX 0.11 on kernels that are
    # equal, as k's and v's, gate's and up's, are written down once.
    name, kernels = ("nf4_matmul_row", 5) if batch == 1 else ("nf4_matmul", 8 if jax.__version_info__ < (0, 11) else 6)
    assert text.count(f'name = "{name}"') == kernels
    assert not [line for line in text.splitlines() if "dynamic_slice" in line and "ui8>" in line]


@pytest.mark.parametrize("tokens", [1, 96])
def test_kernels_give_what_the_definition_does(tokens: int) -> None:
    """A token, and a chunk, after others, as a GPU computes them: cache and logits as near to float32's as without."""
    config = decoder_config(hidden_size=64, intermediate_size=512, head_dim=16)
    rng, start = np.random.default_rng(tokens), 100
    ids = jnp.asarray(rng.integers(0, config.vocab_size, (1, tokens)), jnp.int32)
    past = {name: rng.standard_normal(leaf.shape) for name, leaf in empty_cache(config, 1, 256, jnp.float32).items()}

    def run(dtype: Any) -> list[np.ndarray]:
        generator = make_generator(config, dtype)
        cache = {name: jnp.asarray(some, jnp.bfloat16).astype(dtype) for name, some in past.items()}
        rest = (config, generator.adaptation, jnp.dtype(dtype))
        after, last = decoding._forward(
            generator.frozen, generator.lora, ids, cache, jnp.int32(start), jnp.asarray([7]), *rest
        )
        new = [after[name][:, :, start : start + tokens] for name in "kv"]
        return [np.asarray(x, np.float32) for x in (*new, last)]

    true, own = run(jnp.float32), run(jnp.bfloat16)
    with interpreted():
        got = run(jnp.bfloat16)
    for ours, theirs, wanted in zip(got, own, true, strict=True):
        assert np.linalg.norm(ours - wanted) <= 1.5 * np.linalg.norm(theirs - wanted)


def test_on_a_gpu_a_chunk_holds_slices_of_mlps_and_no_scores() -> None:
    config = decoder_config(hidden_size=64, intermediate_size=512, head_dim=16)
    generator = make_generator(config, jnp.bfloat16)

    def run(frozen: Any, lora: Any, tokens: Any, first: Any) -> Any:
        cache = empty_cache(config, 1, 256, jnp.bfloat16)
        return prefill_chunk(frozen, lora, cache, tokens, 0, first, config, generator.adaptation, generator.dtype)

    tokens, first = jnp.zeros((1, 128), jnp.int32), jnp.zeros(1, jnp.int32)
    text = lower_for_cuda(run, generator.frozen, generator.lora, tokens, first)
    assert 'name = "cached_attention"' in text
    assert "128x256xf32" not in text
    assert f"tensor<{2 * 512 // decoding.SLICES}x128xbf16>" in text
    assert f"tensor<{2 * 512}x" not in text
