"""Rows as a run will see them, for people to read: what is learnt, what is not, and where one document ends."""

from __future__ import annotations

import dataclasses
import html
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.data.dataset import Dataset
from jaxtune.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #7b8592; --panel: #f6f8fa; --learnt: #0a5c2b;
  --learnt-back: #d5f2de; --other-back: #ffe7b8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #8a94a0; --panel: #1c2026; --learnt: #8fe3ad;
  --learnt-back: #173523; --other-back: #4a3810 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
pre { background: var(--panel); border-radius: 8px; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; margin: .3rem 0 }
.of { color: var(--soft); font-size: .8rem; margin: .8rem 0 0 } .masked { color: var(--soft) }
.learnt { color: var(--learnt); background: var(--learnt-back); border-radius: 3px }
.other { background: var(--other-back) }
"""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of neighbouring tokens that have one weight in the loss."""

    text: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Shown:
    """One document of a row. title: where it comes from, and how many of its tokens are learnt."""

    title: str
    pieces: list[Piece]


def show_row(data: Dataset, row: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Shown]:
    """The documents of one row, special tokens included; `row` has their indices."""
    shown = []
    for index in row:
        document = data.documents[index]
        source = next(source for source in data.sources if source.start <= index < source.stop)
        learnt, count = np.count_nonzero(document.weights), len(document.tokens)
        title = f"{source.name}, record {document.record}: {count:,} tokens, {learnt:,} learnt"
        shown.append(Shown(title, list(pieces(document, tokenizer))))
    return shown


def pieces(document: Document, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """The text of a document, cut where the weight of its tokens changes."""
    before, start = "", 0
    for weight, tokens in itertools.groupby(document.weights.tolist()):
        stop = start + len(list(tokens))
        # Of a text that is decoded from its beginning: a tokenizer may write a word otherwise where it is the first.
        text = _decode(tokenizer, document.tokens[:stop].tolist())
        alone = document.tokens[start:stop].tolist()
        yield Piece(text[len(before) :] if text.startswith(before) else _decode(tokenizer, alone), weight)
        before, start = text, stop


def visible(text: str) -> str:
    """The text with escapes for what would move the cursor or show nothing at all."""
    return "".join(_escaped(character) for character in text)


def to_html(title: str, statistics: Sequence[str], rows: Sequence[Sequence[Shown]]) -> str:
    """One page that needs nothing else. statistics: texts as they are. rows: what `show_row` gave."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<pre>{html.escape(visible(text))}</pre>" for text in statistics]
    body.append('<p><span class="learnt">learnt</span> <span class="learnt other">learnt with a weight that is not 1')
    body.append('</span> <span class="masked">not learnt</span></p>')
    for number, row in enumerate(rows, 1):
        body.append(f"<h2>Row {number}: {len(row)} document{'s' if len(row) > 1 else ''}</h2>")
        for shown in row:
            marked = "".join(_mark(piece) for piece in shown.pieces)
            body.append(f'<p class="of">{html.escape(visible(shown.title))}</p><pre>{marked}</pre>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{chr(10).join(body)}</body></html>\n'


def _escaped(character: str) -> str:
    if character in "\n\t" or not unicodedata.category(character).startswith("C"):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def _mark(piece: Piece) -> str:
    kind = "masked" if piece.weight == 0 else "learnt" if piece.weight == 1 else "learnt other"
    title = "" if piece.weight in (0, 1) else f' title="weight {piece.weight:g}"'
    return f'<span class="{kind}"{title}>{html.escape(visible(piece.text))}</span>'


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
