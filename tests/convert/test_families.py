"""Family tables against the models that transformers builds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert import families
from convert import safetensors_io as sio
from convert.families.table import Load, Slot
from convert.merge import merged
from convert.safetensors_io import TensorInfo

F32 = np.dtype(np.float32)


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    return transformers.LlamaConfig(**(sizes | heads | changes))


VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    {"num_key_value_heads": 4, "head_dim": None},
]


def available_of(slots: list[Slot], dtype: np.dtype = F32) -> dict[str, TensorInfo]:
    return {slot.name: TensorInfo(dtype, slot.shape) for slot in slots}


@pytest.mark.parametrize("changes", VARIANTS)
def test_llama_slots_are_the_models_parameters(changes: dict) -> None:
    config = llama_config(**changes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    slots = families.get("llama").slots(config.to_dict())
    assert {slot.name: slot.shape for slot in slots} == expected
    assert len({(slot.path, slot.layer) for slot in slots}) == len(slots)
    assert sum(slot.is_linear for slot in slots) == 3 * 7


def test_defaults_of_old_config_files() -> None:
    config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    shapes = {slot.name: slot.shape for slot in families.get("llama").slots(config)}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (24, 24)
    assert "lm_head.weight" in shapes


def test_config_with_missing_keys() -> None:
    with pytest.raises(ValueError, match=r"hidden_size, vocab_size must be whole numbers"):
        families.get("llama").slots(
            {"intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 0}
        )


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'lama2' is not supported; .*llama"):
        families.get("lama2")


def save(directory: Path, tree: dict, config: dict, **options: Any) -> None:
    def leaf(slot: Slot) -> np.ndarray:
        stack = functools.reduce(lambda node, key: node[key], slot.path, tree)
        return stack if slot.layer is None else stack[slot.layer]

    slots = families.get("llama").slots(config)
    infos, read = merged(slots, leaf, {}, 1.0, leaf(slots[0]).dtype)
    sio.write_model(directory, infos, read, **options)


def load(directory: Path, config: dict) -> dict:
    """Our tree as the plan says, in NumPy: the simplest reader there is."""
    model = sio.open_model(directory)
    tree: dict = {}
    for load in families.get("llama").plan(model.infos, config):
        node = tree
        for key in load.slot.path[:-1]:
            node = node.setdefault(key, {})
        tensor = model.read(load.slot.name)
        if load.slot.layer is None:
            node[load.slot.path[-1]] = tensor
        else:
            stack = node.setdefault(
                load.slot.path[-1], np.empty((config["num_hidden_layers"], *tensor.shape), tensor.dtype)
            )
            stack[load.slot.layer] = tensor
    return tree


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_to_hf_is_bit_identical(tmp_path: Path, changes: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    config = llama_config(**changes)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    tree = load(tmp_path / "hf", config.to_dict())
    save(tmp_path / "ours", tree, config.to_dict(), max_shard_bytes=9000)
    config.save_pretrained(tmp_path / "ours")
    again, information = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=dtype, output_loading_info=True
    )
    assert not any(information.values())
    for (name, parameter), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(parameter, other)


def test_tied_head_and_buffers_in_the_file_are_fine() -> None:
    config = llama_config(tie_word_embeddings=True).to_dict()
    family = families.get("llama")
    available = available_of(family.slots(config))
    available["lm_head.weight"] = TensorInfo(F32, (37, 24))
    available["model.layers.1.self_attn.rotary_emb.inv_freq"] = TensorInfo(F32, (5,))
    assert len(family.plan(available, config)) == len(family.slots(config))


def test_plan_follows_the_files_order() -> None:
    config = llama_config().to_dict()
    family = families.get("llama")
    available = dict(reversed(available_of(family.slots(config)).items()))
    assert [load.slot.name for load in family.plan(available, config)] == list(available)


def test_every_problem_in_one_error() -> None:
    config = llama_config().to_dict()
    family = families.get("llama")
    available = available_of(family.slots(config))
    for layer in range(3):
        del available[f"model.layers.{layer}.mlp.up_proj.weight"]
        available[f"model.layers.{layer}.self_attn.k_proj.weight"] = TensorInfo(F32, (40, 24))
    del available["model.norm.weight"]
    available["model.layers.0.self_attn.q_proj.bias"] = TensorInfo(F32, (40,))
    available["model.layers.3.input_layernorm.weight"] = TensorInfo(F32, (24,))
    available["score.weight"] = TensorInfo(F32, (2, 24))
    available["lm_head.weight"] = TensorInfo(np.dtype(np.int8), (37, 24))
    with pytest.raises(ValueError) as caught:
        family.plan(available, config)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.{0,1,2}.mlp.up_proj.weight",
        "  missing: model.norm.weight",
        "  not known: model.layers.0.self_attn.q_proj.bias",
        "  not known: model.layers.3.input_layernorm.weight",
        "  not known: score.weight",
        "  wrong: lm_head.weight has dtype int8, expected floats of 16 bits or more",
        "  wrong: model.layers.{0,1,2}.self_attn.k_proj.weight has shape [40, 24], expected [20, 24]",
    ]


def with_packed(available: dict[str, TensorInfo], name: str) -> dict[str, TensorInfo]:
    count = int(np.prod(available[name].shape))
    u8 = np.dtype(np.uint8)
    parts = {
        name: TensorInfo(u8, (-(-count // 2), 1)),
        f"{name}.absmax": TensorInfo(u8, (-(-count // 64),)),
        f"{name}.nested_absmax": TensorInfo(F32, (1,)),
        f"{name}.nested_quant_map": TensorInfo(F32, (256,)),
        f"{name}.quant_map": TensorInfo(F32, (16,)),
        f"{name}.quant_state.bitsandbytes__nf4": TensorInfo(u8, (100,)),
    }
    return available | parts


def test_a_4bit_group_is_one_tensor() -> None:
    config = llama_config().to_dict()
    family = families.get("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    available = with_packed(available_of(family.slots(config)), name)
    loads = {load.slot.name: load for load in family.plan(available, config)}
    assert isinstance(loads[name], Load)
    assert loads[name].is_packed
    assert loads[name].sources[0] == name
    assert set(loads[name].sources) == {other for other in available if other.startswith(name)}
    assert sum(load.is_packed for load in loads.values()) == 1
    del available[f"{name}.quant_state.bitsandbytes__nf4"]
    available[name] = TensorInfo(np.dtype(np.uint8), (481, 1))
    with pytest.raises(ValueError, match=r"not known: .*down_proj.weight.absmax"):
        family.plan(available, config)
    available[f"{name}.quant_state.bitsandbytes__nf4"] = TensorInfo(np.dtype(np.uint8), (100,))
    with pytest.raises(ValueError, match=r"down_proj.weight is 481 bytes of 4-bit codes, expected 480 for \[24, 40\]"):
        family.plan(available, config)
