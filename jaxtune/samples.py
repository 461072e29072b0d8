"""What the model says: a user's prompt through the tokenizer's chat template, answered greedily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from jaxtune.errors import UserError
from jaxtune.generate import generate
from jaxtune.models.decoder import Tree
from jaxtune.step import StepConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids that ask for an answer to one user message, or where there is no chat template those of the text.

    Raises:
        UserError: a chat template that refuses a lone user message, or a prompt without tokens.
    """
    text: Any = prompt
    if tokenizer.chat_template:
        message = {"role": "user", "content": prompt}
        try:
            text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"output.sample_prompts: the chat template refuses {prompt!r} as a lone user message: {error}; leave "
                "output.sample_prompts out, or correct the template"
            ) from error
    # A template has written the special tokens already.
    ids: Any = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if not ids:
        raise UserError(f"output.sample_prompts: the tokenizer gives no token for {prompt!r}; use another prompt")
    return list(ids)


def answer(
    frozen: Tree,
    lora: Tree,
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: list[int],
    config: StepConfig,
    max_new_tokens: int,
) -> str:
    """The model's greedy continuation of an encoded prompt, as text."""
    stop_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    new = generate(
        frozen,
        lora,
        prompt_ids,
        config.decoder,
        config.adaptation,
        dtype=config.dtype,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
    )
    return str(tokenizer.decode(new, skip_special_tokens=True))
