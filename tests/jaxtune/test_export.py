"""The adapter that a run leaves, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from convert import peft as adapters
from jaxtune.config import LoraConfig
from jaxtune.errors import UserError
from jaxtune.export import load_peft_adapter, save_peft_adapter
from jaxtune.loading import Source

LAYERS = 2
SHAPES = {("self_attn", "v_proj"): (12, 24), ("mlp", "gate_proj"): (40, 24)}
SOURCE = Source("someone/base", Path("unused"), commit="0" * 40)


def random_lora(config: LoraConfig) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(1), 4))
    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[config.dtype]
    tree: dict[str, Any] = {"layers": {}}
    for (group, name), (n, k) in SHAPES.items():
        lora_a = jax.random.normal(next(keys), (LAYERS, config.r, k), dtype)
        tree["layers"][group] = {
            name: {"lora_A": lora_a, "lora_B": jax.random.normal(next(keys), (LAYERS, n, config.r), dtype)}
        }
    return tree


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [16.0, 2.5])
def test_there_and_back(tmp_path: Path, dtype: Any, alpha: float) -> None:
    config = LoraConfig(
        r=3, lora_alpha=alpha, lora_dropout=0.1, target_modules=("v_proj", "gate_proj"), use_rslora=True, dtype=dtype
    )
    lora = random_lora(config)
    save_peft_adapter(tmp_path, lora, config, SOURCE)
    again, config_again = load_peft_adapter(tmp_path)
    assert config_again == config
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(lora), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    loaded = peft.LoraConfig.from_pretrained(tmp_path)
    assert (loaded.base_model_name_or_path, loaded.revision) == ("someone/base", "0" * 40)
    assert loaded.lora_alpha == alpha


def test_peft_computes_the_same_update(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=("v_proj", "gate_proj"), use_rslora=True)
    lora = random_lora(config)
    save_peft_adapter(tmp_path, lora, config, SOURCE)
    torch.manual_seed(0)
    hf_config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        vocab_size=11,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(hf_config), tmp_path)
    for (group, name), _ in SHAPES.items():
        for layer in range(LAYERS):
            module = getattr(getattr(model.base_model.model.model.layers[layer], group), name)
            factors = lora["layers"][group][name]
            expected = 5 / np.sqrt(3) * np.asarray(factors["lora_B"][layer]) @ np.asarray(factors["lora_A"][layer])
            np.testing.assert_allclose(module.get_delta_weight("default").numpy(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_adapters_become_float32(tmp_path: Path) -> None:
    half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), random_lora(LoraConfig(r=3)))
    fields = {"r": 3, "lora_alpha": 3, "base_model_name_or_path": "x", "use_rslora": None}
    adapters.save_adapter(tmp_path, half, fields)
    lora, config = load_peft_adapter(tmp_path)
    assert (config.dtype, config.use_rslora) == ("fp32", False)
    for one, other in zip(jax.tree.leaves(lora), jax.tree.leaves(half), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_errors_are_for_the_user(tmp_path: Path) -> None:
    config = LoraConfig(r=3)
    save_peft_adapter(tmp_path, random_lora(config), config, SOURCE)
    with pytest.raises(UserError, match="exists; name another place"):
        save_peft_adapter(tmp_path, random_lora(config), config, SOURCE)
    save_peft_adapter(tmp_path, random_lora(config), config, SOURCE, overwrite=True)
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        load_peft_adapter(tmp_path / "nowhere")
