"""One table per model family: Hugging Face tensor names <-> our parameter paths, read in both directions.

Our tree: plain nested dicts; kernels are [out, in]; everything under "layers" is stacked over layers on axis 0.
Letters of the shapes: D model width, N query heads, K kv heads, H head width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from convert.bnb4bit import is_packed
from convert.safetensors_io import TensorInfo

# Lines of one kind in an error, tensors of several layers being one line.
_MOST_LINES = 200
# What bitsandbytes stores beside a 4-bit `weight`: all of it is one logical tensor.
_PACKED_PARTS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    hf: name in HF files; `{i}` stands for the layer.
    path: place in our tree, joined with "/"; a path under "layers/" is one layer of a stacked leaf.
    shape: HF's shape in letters, products with "*": "N*H D".
    when: the fact about the config without which the tensor does not exist; None for always.
    fused: where the HF tensor holds several of ours one below the other, the rows of each in letters, from the top;
        each has a rule of its own, and `shape` is that of its part. part: which of them this is.
    """

    hf: str
    path: str
    shape: str
    when: str | None = None
    fused: tuple[str, ...] = ()
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of ours that a model of a given config has.

    name: of the HF tensor. path, layer: its place in our tree, layer None outside the stack. shape: of one layer of it.
    rows: where the HF tensor holds others too, which of its rows this is. stored_shape: of the whole HF tensor.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    rows: tuple[int, int] | None
    stored_shape: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        """Whether this is one of the layers' linears, the weights that may be held in 4 bits."""
        return self.layer is not None and self.path[-1] == "kernel"


@dataclasses.dataclass(frozen=True)
class Load:
    """Where one slot's values come from: the stored tensors' names, the (packed) weight first."""

    slot: Slot
    sources: tuple[str, ...]

    @property
    def is_packed(self) -> bool:
        """Whether the file holds it as a bitsandbytes 4-bit group."""
        return len(self.sources) > 1


@dataclasses.dataclass(frozen=True)
class Family:
    """All that tells one family's files from another's.

    model_type: HF's name of the family.
    rules: the table.
    facts: HF config -> the letters' values and the truth of every `when`; raises ValueError where keys are missing.
    ignored: regular expressions of names that carry nothing (buffers that old versions saved).
    defaults: what HF's config class assumes where a config.json lacks the key.
    """

    model_type: str
    rules: tuple[Rule, ...]
    facts: Callable[[Mapping[str, Any]], dict[str, int]]
    ignored: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def slots(self, config: Mapping[str, Any]) -> list[Slot]:
        """Every tensor of a model with this HF config, in the table's order, layer by layer within a rule."""
        facts = self.facts({**self.defaults, **config})

        def size(letters: str) -> int:
            return math.prod(facts[letter] for letter in letters.split("*"))

        slots = []
        for rule in self.rules:
            if rule.when is not None and not facts[rule.when]:
                continue
            shape = stored = tuple(size(axis) for axis in rule.shape.split())
            rows = None
            if rule.fused:
                start = sum(size(part) for part in rule.fused[: rule.part])
                rows = (start, start + shape[0])
                stored = (sum(size(part) for part in rule.fused), *shape[1:])
            path = tuple(rule.path.split("/"))
            for layer in range(facts["L"]) if path[0] == "layers" else [None]:
                slots.append(Slot(rule.hf.format(i=layer), path, layer, shape, rows, stored))
        return slots

    def plan(self, available: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[Load]:
        """Match the tensors that a checkpoint offers with those the config asks for.

        A bitsandbytes 4-bit group counts as one tensor of the unpacked shape.

        Returns:
            One Load for every slot, in the order of `available` (the order of the files).

        Raises:
            ValueError: lists every missing, unknown, mis-shaped or mis-typed tensor at once.
        """
        slots = self.slots(config)
        whole = {slot.name for slot in slots}
        harmless = re.compile("|".join(f"(?:{pattern})" for pattern in self.ignored) or r"(?!)")
        unknown = {name for name in available if not harmless.search(name)}
        # A tied model may still store its head; it is the embedding again.
        absent = {rule.hf for rule in self.rules if rule.when == "untied"} - whole
        unknown = {name for name in unknown if not any(name == hf or name.startswith(f"{hf}.") for hf in absent)}
        loads, missing, wrong = [], [], []
        for slot in slots:
            if slot.name not in available:
                missing.append(slot.name)
                continue
            sources: tuple[str, ...] = (slot.name,)
            if is_packed(slot.name, available):
                sources += tuple(slot.name + part for part in _PACKED_PARTS if slot.name + part in available)
            load = Load(slot, sources)
            loads.append(load)
            unknown.difference_update(sources)
            if problem := _problem(load, available[slot.name]):
                wrong.append(f"{slot.name} {problem}")
        missing, wrong = list(dict.fromkeys(missing)), list(dict.fromkeys(wrong))
        if missing or unknown or wrong:
            lines = [
                f"  {kind}: {line}"
                for kind, found in (("missing", missing), ("not known", map(_shown, unknown)), ("wrong", wrong))
                for line in _shortened(_collapse(found))
            ]
            raise ValueError(
                f"the tensors are not those of the {self.model_type} model that config.json describes; "
                "use the config.json and the weights of one and the same model:\n" + "\n".join(lines)
            )
        order = {name: position for position, name in enumerate(available)}
        return sorted(loads, key=lambda load: order[load.sources[0]])


def _problem(load: Load, info: TensorInfo) -> str | None:
    """What is wrong with the stored weight itself, or None."""
    if load.is_packed:
        size = -(-math.prod(load.slot.stored_shape) // 2)
        if info.nbytes != size:
            return f"is {info.nbytes} bytes of 4-bit codes, expected {size} for {list(load.slot.stored_shape)}"
    elif info.shape != load.slot.stored_shape:
        return f"has shape {list(info.shape)}, expected {list(load.slot.stored_shape)}"
    elif info.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        return f"has dtype {info.dtype.name}, expected floats of 16 bits or more"
    return None


def _shown(name: str) -> str:
    """A name from a file, which may hold anything, as it may stand in a message."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more"]


def _collapse(lines: Iterable[str]) -> list[str]:
    """One line where several differ only in the layer, `model.layers.{0,1,2}.mlp...`: 32 layers stay readable."""
    layers: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        before, dot, rest = line.partition("layers.")
        index, _, after = rest.partition(".")
        if dot and index.isdigit():
            layers.setdefault((f"{before}layers.", f".{after}"), []).append(int(index))
        else:
            layers[line, ""] = []
    collapsed = []
    for (before, after), indices in layers.items():
        places = ",".join(map(str, sorted(indices)))
        collapsed.append(f"{before}{'{' + places + '}' if len(indices) > 1 else places}{after}")
    return sorted(collapsed)
