"""An Ollama Modelfile beside a GGUF file: what to load, how a conversation is written down, where an answer stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class _Form:
    """A way to write conversations. turn: (role, content) -> text. opening: of the answer. go: the same for Ollama."""

    turn: Callable[[str, str], str]
    opening: str
    go: str


def _form(before: str, after: str, end: str) -> _Form:
    def turn(role: str, content: str) -> str:
        return f"{before}{role}{after}{content}{end}"

    opening = f"{before}assistant{after}"
    return _Form(
        turn, opening, f"{{{{ range .Messages }}}}{turn('{{ .Role }}', '{{ .Content }}')}{{{{ end }}}}{opening}"
    )


_FORMS = (
    _form("<|im_start|>", "\n", "<|im_end|>\n"),
    _form("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    _form("<|", "|>\n", "<|end|>\n"),
)


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerFast, stops: tuple[str, ...] = ()) -> str:
    """The text of a Modelfile.

    A template that writes ChatML, Llama 3's or Phi-3's form is given in Ollama's language, with the model's own default
    system message if it has one. For others there is no TEMPLATE: Ollama then takes what it recognises in the file.

    Args:
        gguf_name: of the file beside it.
        tokenizer: the model's, with its chat template.
        stops: texts that end an answer, beside the tokenizer's end of sequence.
    """
    lines = [f"FROM ./{gguf_name}"]
    form = next((form for form in _FORMS if _writes(tokenizer, form)), None)
    if form is not None:
        lines.append(f'TEMPLATE """{form.go}"""')
        if system := _default_system(tokenizer, form):
            lines.append(f'SYSTEM """{system}"""')
    eos = (str(tokenizer.eos_token),) if tokenizer.eos_token else ()
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys((*eos, *stops))]
    return "\n".join(lines) + "\n"


def _render(tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str]) -> str | None:
    """The conversation as the chat template writes it, without the token that opens every text."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError):
        # A template that refuses a conversation has another form than those known here.
        return None
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def _writes(tokenizer: PreTrainedTokenizerFast, form: _Form) -> bool:
    turns = (("system", "Be kind."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
    text = _render(tokenizer, *turns)
    # What opens a text may be what opens a turn, and then was taken off too.
    expected = "".join(form.turn(*turn) for turn in turns) + form.opening
    return text in (expected, expected.removeprefix(str(tokenizer.bos_token)))


def _default_system(tokenizer: PreTrainedTokenizerFast, form: _Form) -> str | None:
    text = _render(tokenizer, ("user", "One?"))
    rest = form.turn("user", "One?") + form.opening
    before, _, end = form.turn("system", "\0").partition("\0")
    if tokenizer.bos_token:
        before = before.removeprefix(str(tokenizer.bos_token))
    if text is None or not (text.endswith(end + rest) and text.startswith(before)) or len(text) <= len(rest):
        return None
    return text[len(before) : -len(end + rest)] or None
