"""LoRA adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

Names: `base_model.model.` + the module's HF name + `.lora_A.weight` [R, in] or `.lora_B.weight` [out, R]. Ours is a
tree {"layers": {"self_attn": {"q_proj": {"lora_A": [L, R, in], "lora_B": [L, out, R]}}}}, the targeted linears only.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import families
from convert.peft_config import CONFIG_NAME, NEUTRAL, PREFIX, divisor, of_module, read_config
from convert.safetensors_io import SafetensorsModel, TensorInfo, refuse_existing, write_file, write_json

WEIGHTS_NAME = "adapter_model.safetensors"
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Of a layer, as PEFT writes it.
_NUMBER = "(0|[1-9][0-9]{0,3})"


def check_complete(directory: Path) -> None:
    """Raise ValueError where one of an adapter's two files is missing."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            inside = directory / "adapter"
            is_run = (inside / CONFIG_NAME).is_file()
            remedy = f"name the run's adapter, {inside}" if is_run else "name one that PEFT's save_pretrained wrote"
            raise ValueError(f"{directory}: {name} is missing in this directory; {remedy}")


def is_whole(name: str) -> bool:
    """Whether a tensor of an adapter's file stands in for one of the base model (`modules_to_save`)."""
    return name.startswith(PREFIX) and ".lora_" not in name


def to_peft(
    lora: Mapping[str, Any], model_type: str = "llama", rows: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """The adapter's tensors under PEFT's names, as views of the stacked NumPy leaves.

    Linears that the family's files hold as one (Phi-3's qkv_proj) become one adapter whose rank is the sum of theirs:
    their A one below the other, their B as blocks on the diagonal. It computes the same.

    Args:
        lora: the tree.
        model_type: HF's name of the family.
        rows: of each linear, by our name; needed where only some of those that are held as one are adapted.

    Raises:
        ValueError: `rows` is needed and not given.
    """
    tensors = {}
    for module, paths in _modules(model_type).items():
        nodes: list[Any] = [functools.reduce(lambda node, key: node.get(key, {}), path, lora) for path in paths]
        if not any(nodes):
            continue
        stacks = nodes[0] if len(paths) == 1 else _joined(nodes, [path[-1] for path in paths], rows)
        for part, stack in stacks.items():
            for layer, tensor in enumerate(stack):
                tensors[f"{PREFIX}{module.format(i=layer)}.{part}.weight"] = tensor
    return tensors


def from_peft(
    tensors: Mapping[str, np.ndarray],
    model_type: str = "llama",
    rows: Mapping[str, int] | None = None,
    *,
    rank: int | None = None,
) -> dict[str, Any]:
    """Stack PEFT's tensors into our tree.

    Where a family's files hold several linears as one, each gets its own rows of B, and either its own part of A, where
    `to_peft` joined adapters of `rank`, or all of A.

    Args:
        tensors: by PEFT's names.
        model_type: HF's name of the family.
        rows: of each linear, by our name; needed for such families.
        rank: of the adapters before they were joined.

    Raises:
        ValueError: lists every tensor that is no LoRA weight of this family's linears, and every one that is missing
            for a linear to have both its factors, of equal shapes, in all layers.
    """
    modules = _modules(model_type)
    found: dict[str, dict[str, dict[int, str]]] = {}
    unknown = []
    patterns = {
        module: re.compile(re.escape(PREFIX + module).replace(r"\{i\}", _NUMBER) + r"\.(lora_[AB])\.weight")
        for module in modules
    }
    for name in tensors:
        matches = [(module, match) for module, pattern in patterns.items() if (match := pattern.fullmatch(name))]
        if not matches:
            unknown.append(name)
        for module, match in matches:
            found.setdefault(module, {"lora_A": {}, "lora_B": {}})[match[2]][int(match[1])] = name
    problems = [f"  not known: {name}" for name in sorted(unknown)]
    if not found:
        problems.append("  missing: any LoRA weight")
    count = 1 + max((layer for parts in found.values() for part in parts.values() for layer in part), default=-1)
    stacks: dict[str, dict[str, np.ndarray]] = {}
    for module, parts in found.items():
        shown = module.removeprefix("model.layers.{i}.")
        for part, names in parts.items():
            absent = sorted(set(range(count)) - set(names))
            shapes = {tensors[name].shape for name in names.values()}
            if absent:
                problems.append(f"  missing: {shown}.{part} of layers {absent}")
            elif len(shapes) > 1:
                problems.append(f"  unequal shapes over the layers: {shown}.{part}: {sorted(shapes)}")
            else:
                stacks.setdefault(module, {})[part] = np.stack([tensors[names[layer]] for layer in range(count)])
    if problems:
        raise ValueError(
            f"the adapter's tensors do not fit {model_type}; load one that was trained on all layers of the linears it "
            "targets:\n" + "\n".join(problems)
        )
    tree: dict[str, Any] = {}
    for module, stack in stacks.items():
        paths = modules[module]
        for path, node in zip(paths, [stack] if len(paths) == 1 else _taken_apart(stack, paths, rows, rank)):
            if node:
                *parents, last = path
                functools.reduce(lambda above, key: above.setdefault(key, {}), parents, tree)[last] = node
    return tree


def _joined(
    nodes: Sequence[Mapping[str, np.ndarray]], names: Sequence[str], rows: Mapping[str, int] | None
) -> dict[str, np.ndarray]:
    """One adapter of the linears `names`, which stand one below the other; those without a node add nothing."""
    if rows is None and not all(nodes):
        raise ValueError(f"of {', '.join(names)}, which this family holds as one, some are not adapted; give `rows`")
    heights = [rows[name] if rows is not None else node["lora_B"].shape[1] for name, node in zip(names, nodes)]
    present = [(node, start) for node, start in zip(nodes, np.cumsum([0, *heights])) if node]
    lora_a = np.concatenate([node["lora_A"] for node, _ in present], axis=1)
    lora_b = np.zeros((len(lora_a), sum(heights), lora_a.shape[1]), lora_a.dtype)
    column = 0
    for node, start in present:
        _, height, rank = node["lora_B"].shape
        lora_b[:, start : start + height, column : column + rank] = node["lora_B"]
        column += rank
    return {"lora_A": lora_a, "lora_B": lora_b}


def _taken_apart(
    stack: Mapping[str, np.ndarray], paths: Sequence[tuple[str, ...]], rows: Mapping[str, int] | None, rank: int | None
) -> list[dict[str, np.ndarray]]:
    """What each of the linears at `paths`, which stand one below the other, has of the adapter of all."""
    lora_a, lora_b = stack["lora_A"], stack["lora_B"]
    heights = [(rows or {}).get(path[-1], 0) for path in paths]
    if sum(heights) != lora_b.shape[1]:
        raise ValueError(f"an adapter of {lora_b.shape[1]} rows does not fit linears of {heights} rows")
    blocks = np.split(lora_b, np.cumsum(heights)[:-1], axis=1)
    count = lora_a.shape[1] // rank if rank and lora_a.shape[1] % rank == 0 else 0
    ranges = [slice(i * rank, (i + 1) * rank) for i in range(count)] if rank else []
    owners = [[i for i, block in enumerate(blocks) if block[..., columns].any()] for columns in ranges]
    if count and all(len(owner) == 1 for owner in owners) and len({owner[0] for owner in owners}) == count:
        nodes: list[dict[str, np.ndarray]] = [{} for _ in paths]
        for (owner,), columns in zip(owners, ranges):
            nodes[owner] = {"lora_A": lora_a[:, columns], "lora_B": blocks[owner][..., columns]}
        return nodes
    return [{"lora_A": lora_a, "lora_B": block} for block in blocks]


def save_adapter(
    directory: str | os.PathLike[str],
    lora: Mapping[str, Any],
    fields: Mapping[str, Any],
    *,
    model_type: str = "llama",
    rows: Mapping[str, int] | None = None,
    modules: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        directory: made if it is not there; each of the two files takes its name only when complete.
        lora: the tree, of NumPy arrays (bfloat16 as ml_dtypes').
        fields: of adapter_config.json: r, lora_alpha and base_model_name_or_path, and what else differs from PEFT's
            defaults; target_modules and the constants are filled in.
        model_type: HF's name of the family.
        rows: as in `to_peft`.
        modules: whole tensors by HF name, as `peft_modules.load_modules` gave them; `fields` names them too.
        overwrite: replace an adapter that is already there.

    Raises:
        ValueError: an adapter is there and `overwrite` is false, or no linear is targeted.
    """
    directory = Path(directory)
    tensors = to_peft(lora, model_type, rows)
    targets = sorted({name.split(".")[-3] for name in tensors})
    if not targets:
        raise ValueError(f"{directory}: the adapter targets no linear of {model_type}; there is nothing to save")
    constants = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": targets,
    } | _patterns(tensors, fields, model_type)
    tensors |= {PREFIX + name: tensor for name, tensor in (modules or {}).items()}
    files = [directory / WEIGHTS_NAME, directory / CONFIG_NAME]
    refuse_existing(files, overwrite=overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(files[0], infos, tensors.__getitem__, overwrite=overwrite)
    write_json(files[1], constants | dict(fields), overwrite=overwrite)


def load_adapter(
    directory: str | os.PathLike[str],
    *,
    model_type: str = "llama",
    rows: Mapping[str, int] | None = None,
    allow_modules: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Where modules have ranks or factors of their own (rank_pattern, alpha_pattern), all are given the largest rank, with
    zeros that neither act nor learn, and B takes what differs of the factor on B A: the adapter computes the same.

    Args:
        directory: of the two files.
        model_type: HF's name of the family.
        rows: as in `from_peft`.
        allow_modules: take an adapter with `modules_to_save`; the caller reads them (`peft_modules.load_modules`).

    Returns:
        The tree of NumPy arrays in the file's dtype (B in float32 where it took a factor), and adapter_config.json as a
        dict, with r and lora_alpha that hold for all modules.

    Raises:
        ValueError: missing or damaged files, tensors that do not fit, ranks other than the config's.
        NotImplementedError: DoRA and other kinds that compute more than B A x; names the field.
    """
    directory = Path(directory)
    check_complete(directory)
    config = read_config(directory)
    rank, alpha = config["r"], config.get("lora_alpha", 8)
    for field, neutral in NEUTRAL.items():
        if config.get(field, neutral[0]) not in neutral:
            raise NotImplementedError(
                f"{directory / CONFIG_NAME}: {field} is {config[field]!r}; only plain LoRA is read"
            )
    own_ranks, own_alphas = config["rank_pattern"], config["alpha_pattern"]
    model = SafetensorsModel([directory / WEIGHTS_NAME])
    if config.get("modules_to_save") and not allow_modules:
        raise NotImplementedError(
            f"{directory / CONFIG_NAME}: modules_to_save is {config['modules_to_save']!r}, which has no "
            "form here; merge the adapter into its base model (python -m convert merge)"
        )
    whole = [name for name in model.infos if is_whole(name)] if allow_modules else []
    tensors = {name: model.read(name) for name in model.infos if name not in whole}
    if wrong := [name for name, tensor in tensors.items() if tensor.ndim != 2 or tensor.dtype.name not in _DTYPES]:
        raise ValueError(
            f"{directory / WEIGHTS_NAME}: {wrong[0][:200]!a} has shape {list(tensors[wrong[0]].shape)} and dtype "
            f"{tensors[wrong[0]].dtype.name}; an adapter has matrices of {', '.join(_DTYPES)}: save it again"
        )
    stated = {
        name: int(of_module(own_ranks, name, rank))
        for name in tensors
        if name.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    ranks = {name: tensors[name].shape[0 if ".lora_A." in name else 1] for name in stated}
    wrong = sorted(name for name in stated if ranks[name] != stated[name])
    if wrong:
        found = sorted({ranks[name] for name in wrong})
        what = f"r = {rank}" + (" and a rank_pattern" if config.get("rank_pattern") else "")
        raise ValueError(f"{directory}: {CONFIG_NAME} says {what}, the tensors have ranks {found} ({wrong[0]})")
    factor = alpha / divisor(config, rank)
    for name, own_rank in ranks.items():
        own_factor = float(of_module(own_alphas, name, alpha)) / divisor(config, own_rank)
        if ".lora_B." in name and not math.isclose(own_factor, factor, rel_tol=1e-9):
            tensors[name] = tensors[name].astype(np.float32) * np.float32(own_factor / factor)
    try:
        tree = from_peft(_of_equal_ranks(tensors, ranks), model_type, rows, rank=rank)
    except ValueError as error:
        raise ValueError(f"{directory / WEIGHTS_NAME}: {error}") from error
    largest = max(node["lora_A"].shape[1] for group in tree["layers"].values() for node in group.values())
    for group in tree["layers"].values():
        for node in group.values():
            node |= {part: _padded(node[part], axis, largest) for part, axis in (("lora_A", 1), ("lora_B", 2))}
    if largest != rank:
        config |= {"r": largest, "lora_alpha": factor * divisor(config, largest)}
    return tree, config | {"rank_pattern": {}, "alpha_pattern": {}}


def _patterns(
    tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any], model_type: str
) -> dict[str, dict[str, float]]:
    """rank_pattern and alpha_pattern for the joined linears, whose rank is larger, so that all keep one factor."""
    joined = {module.split(".")[-1] for module, paths in _modules(model_type).items() if len(paths) > 1}
    ranks = {name.split(".")[-3]: tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    others = {module: rank for module, rank in ranks.items() if module in joined and rank != fields["r"]}
    factor = fields.get("lora_alpha", 8) / divisor(fields, fields["r"])
    return {
        "rank_pattern": others,
        "alpha_pattern": {module: factor * divisor(fields, rank) for module, rank in others.items()},
    }


def _of_equal_ranks(tensors: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The tensors, with those of `ranks` padded with zeros to the largest rank that their linear has in any layer."""
    linears = {name: re.sub(r"\.layers\.\d+\.|\.lora_[AB]\.", ".", name) for name in ranks}
    largest: dict[str, int] = {}
    for name, linear in linears.items():
        largest[linear] = max(largest.get(linear, 0), ranks[name])
    padded = {
        name: _padded(tensors[name], 0 if ".lora_A." in name else 1, largest[linear])
        for name, linear in linears.items()
    }
    return {name: padded.get(name, tensor) for name, tensor in tensors.items()}


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    if array.shape[axis] == size:
        return array
    widths = [(0, size - length if i == axis else 0) for i, length in enumerate(array.shape)]
    return np.pad(array, widths)


def _modules(model_type: str) -> dict[str, list[tuple[str, ...]]]:
    """HF name of each linear that an adapter may target ("model.layers.{i}.self_attn.q_proj") -> our paths, from the
    top: several where the family's files hold several of ours as one."""
    modules: dict[str, list[tuple[str, ...]]] = {}
    for rule in families.get(model_type).rules:
        if rule.path.startswith("layers/") and rule.path.endswith("/kernel"):
            modules.setdefault(rule.hf.removesuffix(".weight"), []).append(tuple(rule.path.split("/")[:-1]))
    return modules
