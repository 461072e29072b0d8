"""How the files of `fuzz_files.py` are damaged: in their bytes, or, where they hold JSON or YAML, in what they say."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

import yaml

EXTREMES = (b"-1", b"0", b"18446744073709551615", b"1e400", b"null", b"[]", b"{}", b'""', b"\xff\xfe", b"\x00" * 8)
# Stands for brackets deeper than Python's parsers go, or would like to.
_DEEP, _NESTED = "<deep>", b"[" * 5000 + b"]" * 5000
# In place of any value of a document.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**63,
        2**64,
        10**400,
        _DEEP,
        0.5,
        -1e308,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "\x00", "../../etc/passwd", "/dev/zero", "{{ 7 * 7 }}", "(a+)+$", "F32", "\ud800", "a" * 10_000),
    *([], {}, [[]], [None], {"": None}, [2**40, 2**40], [-1, 3], [0], [1e400], ["a"], {"a": {"a": {}}}),
)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes."""
    for _ in range(rng.randint(1, 4)):
        # Headers and text stand in front: most changes go there.
        where = rng.randrange(max(1, len(content) if rng.random() < 0.3 else min(len(content), 4096)))
        length = rng.choice((1, 2, 4, 8, 32, 256))
        kind = rng.randrange(7)
        if kind == 0:
            content = content[:where] + bytes(rng.randrange(256) for _ in range(length)) + content[where + length :]
        elif kind == 1:
            content = content[:where] + content[where + length :]
        elif kind == 2:
            content = content[:where] + content[where : where + length] * rng.choice((2, 3, 50)) + content[where:]
        elif kind == 3:
            content = content[:where]
        elif kind == 4 and (numbers := list(re.finditer(rb"-?\d+(\.\d+)?", content[:8192]))):
            number = rng.choice(numbers)
            content = content[: number.start()] + rng.choice(EXTREMES) + content[number.end() :]
        elif kind == 5 and (words := list(re.finditer(rb"[A-Za-z_]{3,}", content[:8192]))):
            one, other = rng.choice(words), rng.choice(words)
            content = content[: one.start()] + other.group() + content[one.end() :]
        elif kind == 6:
            value = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
            content = content[:where] + value.to_bytes(8, "little") + content[where + 8 :]
    return content


def restructured(document: Any, rng: random.Random) -> Any:
    """A document of dicts and lists in which one to three values or keys are others."""
    holder = [copy.deepcopy(document)]
    for _ in range(rng.randint(1, 3)):
        places = list(_places(holder))
        above, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0 and isinstance(above, dict):
            above[rng.choice(("", "__class__", str(key) * 2, "model_type"))] = above.pop(key)
        elif kind == 1 and above is not holder:
            del above[key]
        elif kind == 2:
            other, there = rng.choice(places)
            above[key] = copy.deepcopy(other[there]) if _has(other, there) else None
        elif kind == 3:
            above[key] = [above[key]] * rng.choice((1, 2, 50))
        elif kind == 4:
            for _ in range(rng.choice((1, 3, 50))):
                above[key] = [above[key]]
        else:
            above[key] = copy.deepcopy(rng.choice(VALUES))
    return holder[0]


def _has(above: Any, key: Any) -> bool:
    return key in above if isinstance(above, dict) else key < len(above)


def _places(above: Any) -> Any:
    """Every value's container and key."""
    for key in list(above) if isinstance(above, dict) else range(len(above)):
        yield above, key
        if isinstance(above[key], dict | list):
            yield from _places(above[key])


def in_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(restructured(json.loads(content), rng)).encode().replace(f'"{_DEEP}"'.encode(), _NESTED)


def in_json_lines(content: bytes, rng: random.Random) -> bytes:
    """One record of many."""
    lines = content.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = in_json(lines[index], rng)
    return b"\n".join(lines) + b"\n"


def in_yaml(content: bytes, rng: random.Random) -> bytes:
    text = yaml.safe_dump(restructured(yaml.safe_load(content), rng))
    return text.encode("utf-8", "surrogatepass").replace(_DEEP.encode(), _NESTED)


def in_header(content: bytes, rng: random.Random) -> bytes:
    """The JSON in front of a safetensors file; its length says so."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = in_json(content[8:end], rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


BY_SUFFIX: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": in_json,
    ".jsonl": in_json_lines,
    ".yaml": in_yaml,
    ".safetensors": in_header,
}
