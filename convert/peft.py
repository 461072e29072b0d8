"""LoRA adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

Names: `base_model.model.` + the module's HF name + `.lora_A.weight` [R, in] or `.lora_B.weight` [out, R]. Ours is a
tree {"layers": {"self_attn": {"q_proj": {"lora_A": [L, R, in], "lora_B": [L, out, R]}}}}, the targeted linears only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import families
from convert.safetensors_io import SafetensorsModel, TensorInfo, refuse_existing, write_file, write_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# The fields whose other values would make an adapter compute something else than B A x.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "alora_invocation_tokens": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
}


def to_peft(lora: Mapping[str, Any], model_type: str = "llama") -> dict[str, np.ndarray]:
    """The adapter's tensors under PEFT's names, as views of the stacked NumPy leaves."""
    tensors = {}
    for path, module in _modules(model_type).items():
        node: Any = lora
        for key in path:
            node = node.get(key, {})
        for part, stack in node.items():
            for layer, tensor in enumerate(stack):
                tensors[f"{_PREFIX}{module.format(i=layer)}.{part}.weight"] = tensor
    return tensors


def from_peft(tensors: Mapping[str, np.ndarray], model_type: str = "llama") -> dict[str, Any]:
    """Stack PEFT's tensors into our tree.

    Raises:
        ValueError: lists every tensor that is no LoRA weight of this family's linears, and every one that is missing
            for a linear to have both its factors, of equal shapes, in all layers.
    """
    found: dict[tuple[str, ...], dict[str, dict[int, str]]] = {}
    unknown = []
    patterns = {
        path: re.compile(re.escape(_PREFIX + module).replace(r"\{i\}", r"(\d+)") + r"\.(lora_[AB])\.weight")
        for path, module in _modules(model_type).items()
    }
    for name in tensors:
        matches = [(path, match) for path, pattern in patterns.items() if (match := pattern.fullmatch(name))]
        if not matches:
            unknown.append(name)
        for path, match in matches:
            found.setdefault(path, {"lora_A": {}, "lora_B": {}})[match[2]][int(match[1])] = name
    problems = [f"  not known: {name}" for name in sorted(unknown)]
    if not found:
        problems.append("  missing: any LoRA weight")
    count = 1 + max((layer for parts in found.values() for part in parts.values() for layer in part), default=-1)
    tree: dict[str, Any] = {}
    for path, parts in found.items():
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        module = ".".join(path[1:])
        for part, names in parts.items():
            absent = sorted(set(range(count)) - set(names))
            shapes = {tensors[name].shape for name in names.values()}
            if absent:
                problems.append(f"  missing: {module}.{part} of layers {absent}")
            elif len(shapes) > 1:
                problems.append(f"  unequal shapes over the layers: {module}.{part}: {sorted(shapes)}")
            else:
                node[part] = np.stack([tensors[names[layer]] for layer in range(count)])
    if problems:
        raise ValueError(
            f"the adapter's tensors do not fit {model_type}; load one that was trained on all layers of the linears it "
            "targets:\n" + "\n".join(problems)
        )
    return tree


def save_adapter(
    directory: str | os.PathLike[str],
    lora: Mapping[str, Any],
    fields: Mapping[str, Any],
    *,
    model_type: str = "llama",
    overwrite: bool = False,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        directory: made if it is not there; each of the two files takes its name only when complete.
        lora: the tree, of NumPy arrays (bfloat16 as ml_dtypes').
        fields: of adapter_config.json: r, lora_alpha and base_model_name_or_path, and what else differs from PEFT's
            defaults; target_modules and the constants are filled in.
        model_type: HF's name of the family.
        overwrite: replace an adapter that is already there.

    Raises:
        ValueError: an adapter is there and `overwrite` is false, or no linear is targeted.
    """
    directory = Path(directory)
    tensors = to_peft(lora, model_type)
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
    }
    files = [directory / WEIGHTS_NAME, directory / CONFIG_NAME]
    refuse_existing(files, overwrite=overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(files[0], infos, tensors.__getitem__, overwrite=overwrite)
    write_json(files[1], constants | dict(fields), overwrite=overwrite)


def load_adapter(
    directory: str | os.PathLike[str], *, model_type: str = "llama"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Returns:
        The tree of NumPy arrays in the file's dtype, and adapter_config.json as a dict.

    Raises:
        ValueError: missing or damaged files, tensors that do not fit, ranks other than the config's.
        NotImplementedError: DoRA, ranks per module and other kinds that compute more than B A x; names the field.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: {name} is missing; name a directory that PEFT's save_pretrained wrote")
    try:
        config = dict(json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")))
        rank = int(config["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG_NAME}: not a LoRA config ({error!r}); save the adapter again") from error
    for field, neutral in _NEUTRAL.items():
        if config.get(field, neutral[0]) not in neutral:
            raise NotImplementedError(
                f"{directory / CONFIG_NAME}: {field} is {config[field]!r}; only plain LoRA is read"
            )
    model = SafetensorsModel([directory / WEIGHTS_NAME])
    try:
        tree = from_peft({name: model.read(name) for name in model.infos}, model_type)
    except ValueError as error:
        raise ValueError(f"{directory / WEIGHTS_NAME}: {error}") from error
    ranks = {tensor.shape[0] for name, tensor in to_peft(tree, model_type).items() if ".lora_A." in name}
    ranks |= {tensor.shape[1] for name, tensor in to_peft(tree, model_type).items() if ".lora_B." in name}
    if ranks != {rank}:
        raise ValueError(f"{directory}: {CONFIG_NAME} says r = {rank}, the tensors have ranks {sorted(ranks)}")
    return tree, config


def _modules(model_type: str) -> dict[tuple[str, ...], str]:
    """Our path -> HF name ("model.layers.{i}.self_attn.q_proj") of each linear that an adapter may target."""
    return {
        tuple(rule.path.split("/")[:-1]): rule.hf.removesuffix(".weight")
        for rule in families.get(model_type).rules
        if rule.path.startswith("layers/") and rule.path.endswith("/kernel")
    }
