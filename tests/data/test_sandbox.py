"""Templates that would run on, or fill the memory: each is stopped within seconds, and no record is blamed."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from jaxtune.config import DataConfig
from jaxtune.data import sandbox
from jaxtune.data.dataset import build
from jaxtune.errors import UserError

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THOUSANDS = "range(99999)"
GROW = "{% set n = namespace(s='xx') %}{% for i in range(60) %}"
BOMBS = {
    "loops in loops": f"{{% for a in {THOUSANDS} %}}{{% for b in {THOUSANDS} %}}{{% endfor %}}{{% endfor %}}",
    "loops over pairs": f"{{% for a, b in [(1, 2)] * 99999 %}}{{% for c in {THOUSANDS} %}}{{% endfor %}}{{% endfor %}}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters over lists": f"{{{{ ([{THOUSANDS}] * 99999) | map('sum') | sum }}}}",
    "a text times a number": "{{ 'x' * 99999999999 }}",
    "a number times a list": "{% set y = 99999999999 * [0] %}",
    "doubled with +": GROW + "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled with ~": GROW + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled in a block": GROW + "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}{% endfor %}",
    "doubled in a list": GROW + "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "replaced": GROW + "{% set n.s = n.s.replace('x', n.s) %}{% endfor %}",
    "padded": "{{ 'x' | center(99999999999) }}",
    "padded by a method": "{{ 'x'.ljust(99999999999) }}",
    "padded a little, often": f"{{{{ {THOUSANDS} | map('center', 9999999) | list | length }}}}",
    "padded by %": "{{ '%99999999999d' % 1 }}",
    "padded by format": "{{ '{:999999999}'.format(1) }}",
    "a width in a format": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "a width from a number": "{{ '%*d' % (9999999999, 1) }}",
    "indented": "{{ [[1]] | tojson(indent=9999999999) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "powers of powers": GROW + "{% set n.s = (n.s if i else 9) * (n.s if i else 9) %}{% endfor %}",
    "nonsense words": "{{ lipsum(99999) }}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_template_that_runs_on_is_stopped(
    bomb: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "STEPS", 50_000)
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    records = [{"instruction": "a", "output": "b"}] * 3
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(UserError, match="trying the chat template: the chat template") as caught:
        build(DataConfig("-", on_bad_record="skip"), make_tokenizer(bomb + TURNS + PROMPT), records=records)
    assert "on_bad_record" not in str(caught.value)
    assert time.thread_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ 1" + "0" * 5000 + " }}"])
def test_a_template_beyond_what_can_be_compiled(
    source: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(UserError, match="the chat template"):
        build(DataConfig("-"), make_tokenizer(source), records=[{"instruction": "a", "output": "b"}])


def test_a_long_conversation_is_within_the_limits(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    turns = [{"role": role, "content": "word " * 200} for _ in range(100) for role in ("user", "assistant")]
    grown = (
        "{% set n = namespace(s='') %}{% for m in messages %}"
        "{% set n.s = m.role + n.s[:99] ~ m.content | trim %}{% endfor %}"
    )
    data = build(
        DataConfig("-", overlong="split"), make_tokenizer(grown + TURNS + PROMPT), records=[{"messages": turns}]
    )
    assert data.statistics.records == 1
    assert data.statistics.bad == 0
