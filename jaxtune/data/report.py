"""What a run says of its data before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxtune.data.dataset import Dataset, Source

_BAR = "▏▎▍▌▋▊▉█"
_BAR_WIDTH = 30
_NAMED = 5


def describe_all(sets: Mapping[str, Dataset]) -> list[str]:
    """What is to be said of the training data and of each held-out set, by their names: `train` and others."""
    described = []
    for name, data in sets.items():
        text = describe(name, data)
        also = 0
        if name != "train":
            also = int(np.isin(data.documents.digests, sets["train"].documents.digests).sum())
        if also:
            text += (
                f"\n  {also:,} of its documents are in the training data, too: their loss says what was learnt by heart"
            )
        described.append(text)
    return described


def describe(name: str, data: Dataset) -> str:
    """Some lines: what was recognised, what is learnt, how long the documents are, and what became of the others."""
    s = data.statistics
    left_out = _listed(
        (s.bad, "bad"),
        (s.truncated, "truncated"),
        (s.dropped, "dropped as too long"),
        (s.split, "split"),
        (s.unlearnt, "unlearnt"),
        (s.duplicates, "duplicates kept"),
        (s.altered, "altered by the chat template"),
    )
    lines = [
        f"{name}: {s.documents:,} documents of {s.records:,} records{f' ({left_out})' if left_out else ''}, "
        f"{s.tokens:,} tokens ({s.learnt_tokens:,} learnt, {s.learnt_tokens / s.tokens:.1%}) in {s.rows:,} rows, "
        f"{s.fill:.1%} full"
    ]
    lines += [line for source in data.sources for line in _describe_source(source)]
    lengths = data.documents.lengths
    quantiles = [int(x) for x in np.quantile(lengths, [0.5, 0.9, 0.99], method="inverted_cdf")]
    lines.append(
        "  lengths: median {}, 90 % up to {}, 99 % up to {}, longest {}".format(*quantiles, int(lengths.max()))
    )
    lines += _draw_histogram(data)
    return "\n".join(lines)


def histogram(data: Dataset) -> list[tuple[int, int]]:
    """Numbers of documents by length: pairs of an upper limit, a power of two, and the documents up to it and beyond
    the limit before."""
    powers = np.ceil(np.log2(data.documents.lengths)).astype(int)
    counts = np.bincount(powers)
    return [(1 << power, int(counts[power])) for power in range(powers.min(), len(counts))]


def _draw_histogram(data: Dataset) -> list[str]:
    bars = histogram(data)
    most = max(count for _, count in bars)
    lines = []
    for limit, count in bars:
        eighths = round(8 * _BAR_WIDTH * count / most)
        bar = _BAR[-1] * (eighths // 8) + (_BAR[eighths % 8 - 1] if eighths % 8 else "")
        lines.append(f"  up to {limit:>7,} tokens {count:>9,} {bar}".rstrip())
    return lines


def _describe_source(source: Source) -> list[str]:
    tally = source.tally
    times = "" if source.weight == 1 else f", {source.weight:g} times an epoch"
    lines = [f"  {source.name}: form {source.form}, {source.stop - source.start:,} documents{times}"]
    if tally.date is not None:
        lines.append(
            f"  the chat template asks for today's date and is given {tally.date} (data.template_date), so that "
            "the data are the same on every day"
        )
    lines += [f"  longer than a row: {_records(tally.overlong)}"] if tally.overlong else []
    lines += [f"  nothing to learn: {_records(tally.unlearnt)}"] if tally.unlearnt else []
    lines += [f"  passed over: {example}" for example in tally.examples]
    if (more := tally.bad - len(tally.examples)) > 0:
        lines.append(f"  and {more:,} more")
    return lines


def _listed(*counts: tuple[int, str]) -> str:
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def _records(numbers: Sequence[int]) -> str:
    """Records by their numbers, of which a few are named."""
    distinct = list(dict.fromkeys(numbers))
    more = f" and {len(distinct) - _NAMED:,} more" if len(distinct) > _NAMED else ""
    return f"record{'s' if len(distinct) > 1 else ''} {', '.join(map(str, distinct[:_NAMED]))}{more}"
