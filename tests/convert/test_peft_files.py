"""Adapter files against peft itself: it loads ours with equal tensors, we load its."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers

from convert import peft as adapters
from convert import safetensors_io as sio
from convert.merge import adapter_scaling

LAYERS, RANK, WIDTH = 3, 5, 24
OUT_IN = {
    ("self_attn", "q_proj"): (40, WIDTH),
    ("self_attn", "k_proj"): (20, WIDTH),
    ("self_attn", "o_proj"): (WIDTH, 40),
    ("mlp", "down_proj"): (WIDTH, 36),
}
FIELDS = {"r": RANK, "lora_alpha": 7, "base_model_name_or_path": "someone/base", "use_rslora": True}


def tiny_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=36,
        num_hidden_layers=LAYERS,
        vocab_size=11,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
    )
    return transformers.LlamaForCausalLM(config)


def random_lora(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    tree: dict[str, Any] = {"layers": {}}
    for (group, name), (n, k) in OUT_IN.items():
        lora_a = rng.standard_normal((LAYERS, RANK, k)).astype(dtype)
        lora_b = rng.standard_normal((LAYERS, n, RANK)).astype(dtype)
        tree["layers"].setdefault(group, {})[name] = {"lora_A": lora_a, "lora_B": lora_b}
    return tree


def assert_same_tree(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, dict):
            assert_same_tree(got[key], value)
        else:
            assert got[key].dtype == value.dtype
            np.testing.assert_array_equal(got[key], value)


def test_peft_loads_our_adapter(tmp_path: Path) -> None:
    lora = random_lora()
    adapters.save_adapter(tmp_path, lora, FIELDS)
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert len(loaded) == 2 * LAYERS * len(OUT_IN)
    for (group, name), _ in OUT_IN.items():
        for part in ("lora_A", "lora_B"):
            for layer in range(LAYERS):
                tensor = loaded[f"base_model.model.model.layers.{layer}.{group}.{name}.{part}.weight"]
                np.testing.assert_array_equal(tensor.numpy(), lora["layers"][group][name][part][layer])
    module = model.base_model.model.model.layers[1].self_attn.q_proj
    assert module.scaling["default"] == pytest.approx(7 / RANK**0.5)
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == "someone/base"
    assert config.target_modules == {"q_proj", "k_proj", "o_proj", "down_proj"}
    assert (config.task_type, config.inference_mode) == ("CAUSAL_LM", True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_our_adapter_round_trips(tmp_path: Path, dtype: Any) -> None:
    lora = random_lora(dtype)
    adapters.save_adapter(tmp_path, lora, FIELDS)
    again, config = adapters.load_adapter(tmp_path)
    assert_same_tree(again, lora)
    assert FIELDS.items() <= config.items()


def peft_adapter(directory: Path, **changes: Any) -> peft.PeftModel:
    settings = {"r": RANK, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**(settings | changes)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return model


def test_we_load_pefts_adapter(tmp_path: Path) -> None:
    state = peft.get_peft_model_state_dict(peft_adapter(tmp_path))
    tree, config = adapters.load_adapter(tmp_path)
    flat = adapters.to_peft(tree)
    assert flat.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(flat[name], tensor.numpy())
    assert config["lora_alpha"] == 7


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_dora": True}, NotImplementedError, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, NotImplementedError, "modules_to_save is"),
        ({"layers_to_transform": [0, 2]}, ValueError, r"missing: self_attn.q_proj.lora_A of layers \[1\]"),
        ({"target_modules": ["lm_head"]}, ValueError, "not known: base_model.model.lm_head.lora_A.weight"),
    ],
)
def test_adapters_that_do_more_are_refused(tmp_path: Path, changes: dict, error: type, message: str) -> None:
    peft_adapter(tmp_path, **changes)
    with pytest.raises(error, match=message):
        adapters.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}, RANK),
        ({"rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 8}, "use_rslora": True}, 8),
        ({"alpha_pattern": {"layers.2.mlp.up_proj": 1.5}}, RANK),
    ],
)
def test_ranks_and_factors_of_single_modules(tmp_path: Path, changes: dict[str, Any], rank: int) -> None:
    """All linears get one rank and one factor, and compute what PEFT computes."""
    model = peft_adapter(tmp_path, **changes)
    tree, config = adapters.load_adapter(tmp_path)
    assert config["r"] == rank
    factor = adapter_scaling(config)
    for group, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
        for layer, module in enumerate(model.base_model.model.model.layers):
            node = tree["layers"][group][name]
            expected = getattr(getattr(module, group), name).get_delta_weight("default").detach().numpy()
            update = factor * node["lora_B"][layer] @ node["lora_A"][layer]
            np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
            assert node["lora_A"].shape[1] == rank


PHI = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
PHI_LINEARS = {
    "q_proj": (24, 24),
    "k_proj": (12, 24),
    "v_proj": (12, 24),
    "o_proj": (24, 24),
    "gate_proj": (36, 24),
    "up_proj": (36, 24),
    "down_proj": (24, 36),
}
PHI_ROWS = {name: shape[0] for name, shape in PHI_LINEARS.items()}


def tiny_phi() -> transformers.Phi3ForCausalLM:
    torch.manual_seed(0)
    config = transformers.Phi3Config(**PHI, num_hidden_layers=LAYERS, vocab_size=11, pad_token_id=0, eos_token_id=1)
    return transformers.Phi3ForCausalLM(config)


def phi_lora(targets: tuple[str, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(12)
    tree: dict[str, Any] = {"layers": {}}
    for name in targets:
        n, k = PHI_LINEARS[name]
        group = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        tree["layers"].setdefault(group, {})[name] = {
            "lora_A": rng.standard_normal((LAYERS, RANK, k), np.float32),
            "lora_B": rng.standard_normal((LAYERS, n, RANK), np.float32),
        }
    return tree


@pytest.mark.parametrize("targets", [tuple(PHI_LINEARS), ("q_proj", "v_proj", "down_proj"), ("up_proj",)])
def test_linears_that_are_held_as_one(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """In peft, one adapter of qkv_proj computes what ours compute of q, k and v; and ours come back as they were."""
    lora = phi_lora(targets)
    adapters.save_adapter(tmp_path, lora, FIELDS, model_type="phi3", rows=PHI_ROWS)
    assert_same_tree(adapters.load_adapter(tmp_path, model_type="phi3", rows=PHI_ROWS)[0], lora)
    model = peft.PeftModel.from_pretrained(tiny_phi(), tmp_path)
    layer, factor = model.base_model.model.model.layers[1], 7 / RANK**0.5
    for module, group, names in (
        (layer.self_attn.qkv_proj, "self_attn", ("q_proj", "k_proj", "v_proj")),
        (layer.mlp.gate_up_proj, "mlp", ("gate_proj", "up_proj")),
        (layer.mlp.down_proj, "mlp", ("down_proj",)),
    ):
        if not set(names) & set(targets):
            assert not hasattr(module, "get_delta_weight")
            continue
        updates = [
            factor * lora["layers"][group][name]["lora_B"][1] @ lora["layers"][group][name]["lora_A"][1]
            if name in targets
            else np.zeros(PHI_LINEARS[name])
            for name in names
        ]
        delta = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, np.concatenate(updates), rtol=1e-5, atol=1e-5)


def test_pefts_adapter_of_linears_that_are_held_as_one(tmp_path: Path) -> None:
    settings = {"r": RANK, "lora_alpha": 7, "target_modules": ["qkv_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_phi(), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    tree, config = adapters.load_adapter(tmp_path, model_type="phi3", rows=PHI_ROWS)
    nodes = [tree["layers"]["self_attn"][name] for name in ("q_proj", "k_proj", "v_proj")]
    updates = [adapter_scaling(config) * node["lora_B"][2] @ node["lora_A"][2] for node in nodes]
    expected = model.base_model.model.model.layers[2].self_attn.qkv_proj.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(np.concatenate(updates), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="does not fit linears of"):
        adapters.load_adapter(tmp_path, model_type="phi3")
    with pytest.raises(ValueError, match=r"not known: .*qkv_proj"):
        adapters.load_adapter(tmp_path)


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        adapters.load_adapter(tmp_path)
    lora = random_lora()
    adapters.save_adapter(tmp_path, lora, FIELDS)
    adapters.save_adapter(tmp_path, lora, FIELDS | {"r": RANK + 1}, overwrite=True)
    with pytest.raises(ValueError, match=r"says r = 6, the tensors have ranks \[5\]"):
        adapters.load_adapter(tmp_path)
    for text in (json.dumps({"lora_alpha": 1}), '{"r": 1e400}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="not a LoRA config"):
            adapters.load_adapter(tmp_path)


def test_every_problem_in_one_error() -> None:
    tensors = adapters.to_peft(random_lora())
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.k_proj.lora_B.weight"]
    tensors[f"{prefix}.1.mlp.down_proj.lora_A.weight"] = np.zeros((2, 2), np.float32)
    tensors[f"{prefix}.1.mlp.down_proj.lora_C.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError) as caught:
        adapters.from_peft(tensors)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  not known: base_model.model.model.layers.1.mlp.down_proj.lora_C.weight",
        "  missing: self_attn.k_proj.lora_B of layers [0]",
        "  unequal shapes over the layers: mlp.down_proj.lora_A: [(2, 2), (5, 36)]",
    ]
    with pytest.raises(ValueError, match="missing: any LoRA weight"):
        adapters.from_peft({})


def test_nothing_is_overwritten_or_left_half_done(tmp_path: Path) -> None:
    lora = random_lora()
    adapters.save_adapter(tmp_path / "a", lora, FIELDS)
    with pytest.raises(ValueError, match="exists; name another place"):
        adapters.save_adapter(tmp_path / "a", lora, FIELDS)
    with pytest.raises(ValueError, match="targets no linear"):
        adapters.save_adapter(tmp_path / "b", {"layers": {}}, FIELDS)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "a",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sio.SafetensorsModel([tmp_path / "a" / adapters.WEIGHTS_NAME]).infos


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        (7, ValueError, "rank_pattern is no mapping"),
        ({"q_proj": "8"}, ValueError, "rank_pattern is no mapping"),
        ({"q_proj": float("nan")}, ValueError, "rank_pattern is no mapping"),
        ({"(a+)+$": 8}, NotImplementedError, "names of modules are read"),
        ({".*.*.*.*": 8}, NotImplementedError, "names of modules are read"),
    ],
)
def test_patterns_are_checked(tmp_path: Path, pattern: Any, error: type[Exception], message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "rank_pattern": pattern}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(error, match=message):
        adapters.load_adapter(tmp_path)
