"""Whole tensors in an adapter's file: what PEFT's `modules_to_save` trained beside the adapter, such as the embedding.

Names: `base_model.model.` + the tensor's HF name. Each stands in for the base model's tensor of that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import families
from convert.families.table import Slot
from convert.peft import WEIGHTS_NAME, check_complete, is_whole
from convert.peft_config import PREFIX, read_config
from convert.safetensors_io import SafetensorsModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_modules(
    directory: str | os.PathLike[str], hf_config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the whole tensors of an adapter's directory.

    Args:
        directory: PEFT's.
        hf_config: of the base model.

    Returns:
        The tensors by HF name, {} where there are none, and the HF config of a model that has them: its vocabulary is
        as long as they are, and a head that was the embedding is one of its own where only one of the two was trained.

    Raises:
        ValueError: a missing file; tensors that the model has not, or of other shapes, all of them listed.
        NotImplementedError: linears that were trained whole.
    """
    check_complete(Path(directory))
    path = Path(directory) / WEIGHTS_NAME
    model = SafetensorsModel([path])
    # Of an embedding that was resized PEFT saves what it trained and what stood there before, by their inner names.
    modules = {
        name.removeprefix(PREFIX).replace(".modules_to_save.", "."): model.read(name)
        for name in model.infos
        if is_whole(name) and ".original_module." not in name
    }
    adapter = read_config(Path(directory))
    if not modules and adapter.get("modules_to_save"):
        raise ValueError(f"{path}: none of modules_to_save ({adapter['modules_to_save']}) is in it; save it again")
    if not modules:
        return {}, dict(hf_config)
    config = _config_with(modules, hf_config, tied=bool(adapter.get("ensure_weight_tying")))
    slots = {slot.name: slot for slot in families.get(config["model_type"]).slots(config)}
    linears = sorted(name for name in modules if name in slots and slots[name].is_linear)
    if linears:
        raise NotImplementedError(f"{path}: {linears[0]} was trained whole; adapt linears with LoRA (target_modules)")
    problems = [f"  not known: {name}" for name in sorted(modules) if name not in slots]
    problems += [
        f"  wrong: {name} has shape {list(tensor.shape)}, expected {list(slots[name].stored_shape)}"
        for name, tensor in sorted(modules.items())
        if name in slots and tensor.shape != slots[name].stored_shape
    ]
    problems += [
        f"  wrong: {name} has dtype {tensor.dtype.name}, expected floats of 16 bits or more"
        for name, tensor in sorted(modules.items())
        if tensor.dtype.name not in ("float16", "bfloat16", "float32")
    ]
    longer = config["vocab_size"] != hf_config["vocab_size"]
    if longer and HEAD not in modules and not config.get("tie_word_embeddings"):
        problems.append(f"  missing: {HEAD}, as the embedding has another vocabulary than the base model's head")
    if problems:
        raise ValueError(
            f"{path}: its modules_to_save are not the base model's; name the model that the adapter was trained on:\n"
            + "\n".join(problems)
        )
    return modules, config


def saved_fields(modules: Mapping[str, np.ndarray], *, tied: bool) -> dict[str, Any]:
    """What adapter_config.json says of `modules`; tied: whether the head is the embedding."""
    names = sorted(name.removesuffix(".weight") for name in modules)
    return {"modules_to_save": names or None} | ({"ensure_weight_tying": True} if tied and EMBEDDING in modules else {})


def placed(
    values: Callable[[Slot], np.ndarray], modules: Mapping[str, np.ndarray], base_slots: Iterable[Slot]
) -> Callable[[Slot], np.ndarray]:
    """A merge's base values (`convert.merge.base_values`) with `modules` in place of the tensors of their names.

    base_slots: of the base model, where the head may be the embedding that it no longer is.
    """
    base = {slot.name: slot for slot in base_slots}

    def read(slot: Slot) -> np.ndarray:
        if slot.name not in modules:
            return values(slot if slot.name in base else base[EMBEDDING])
        return modules[slot.name]

    return read


def _config_with(modules: Mapping[str, np.ndarray], hf_config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    config = dict(hf_config)
    if config.get("tie_word_embeddings") and (EMBEDDING in modules or HEAD in modules):
        config["tie_word_embeddings"] = tied and HEAD not in modules
    if EMBEDDING in modules and modules[EMBEDDING].ndim == 2:
        config["vocab_size"] = modules[EMBEDDING].shape[0]
    return config
