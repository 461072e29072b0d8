"""How arrays are cut over a mesh, and what a step sends, from shapes alone: no mesh of devices is needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoder_config, frozen_tree

from jaxtune.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.errors import UserError
from jaxtune.health import LLAMA_3_8B
from jaxtune.mesh import check_mesh, split_linears
from jaxtune.structure import frozen_structure
from jaxtune.traffic import sent_bytes, step_collectives
from pallas_kernels.lora_linear import PartKey
from pallas_kernels.nf4 import NF4Tensor, dequantize

BF16 = jnp.dtype(jnp.bfloat16)


def run(batch_size: int = 8, **mesh: int) -> RunConfig:
    train = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=2)
    data, lora = DataConfig("d", max_length=2048), LoraConfig(r=16)
    return RunConfig(ModelConfig("m"), data, OutputConfig("out"), lora, train, MeshConfig(**mesh))


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("tensor", [2, 4])
def test_parts_of_linears_together_are_the_whole(nf4: bool, tensor: int) -> None:
    decoder = decoder_config(hidden_size=64, intermediate_size=256, num_heads=8, num_kv_heads=4, head_dim=32)
    whole = frozen_tree(decoder, nf4=nf4)
    parts = split_linears(whole, tensor)

    def dense(leaf: Any) -> np.ndarray:
        return np.asarray(dequantize(leaf) if isinstance(leaf, NF4Tensor) else leaf)

    for group, linears in (("self_attn", ("q_proj", "v_proj", "o_proj")), ("mlp", ("up_proj", "down_proj"))):
        for name in linears:
            expected, cut = (dense(tree["layers"][group][name]["kernel"]) for tree in (whole, parts))
            axis = 2 if name in ("o_proj", "down_proj") else 1
            assert cut.shape[:2] == (decoder.num_layers, tensor)
            np.testing.assert_array_equal(np.concatenate([cut[:, i] for i in range(tensor)], axis=axis), expected)


def test_a_cut_through_a_block_of_scales_is_refused() -> None:
    with pytest.raises(UserError, match=r"mesh.tensor is 2: o_proj \[48, 48\] .* lower mesh.tensor"):
        split_linears(frozen_tree(decoder_config()), 2)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensor": 3}, r"mesh.tensor is 3, .* 4 query heads; set mesh.tensor to 1 or 2"),
        ({"tensor": 4}, r"does not divide the 2 key and value heads"),
        ({"sequence": 2}, r"mesh.sequence is 2, .* 2047 tokens of a row"),
        ({"sequence": 23, "tensor": 2}, r"mesh.sequence is 23, .* 2 query heads of each device; set .* to 1"),
    ],
)
def test_what_cannot_be_spread_is_refused(mesh: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_mesh(MeshConfig(**mesh), decoder_config(), 2047)


def test_part_of_a_dropout_mask_is_the_wholes() -> None:
    key, whole, first, part = jax.random.key(5), (6, 10, 37), (2, 4, 11), (3, 5, 7)
    expected = jax.random.bernoulli(jax.random.fold_in(key, 2), 0.7, whole)
    expected = jax.lax.dynamic_slice(expected, first, part).reshape(15, 7)
    np.testing.assert_array_equal(PartKey(key, jnp.array(first), part, whole).keep(2, 0.7), expected)


def test_fsdp_sends_packed_weights_twice_a_micro_batch() -> None:
    config = run(fsdp=8)
    found = step_collectives(config, LLAMA_3_8B, BF16, "none")
    layers = frozen_structure(LLAMA_3_8B, config.model, BF16)["layers"]
    packed = [leaf for leaf in jax.tree.leaves(layers) if leaf.dtype == jnp.uint8]
    sizes = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    sent = sum(each.sent(sizes) for each in found if each.dtype == "uint8")
    # Two micro-batches, forward and backward pass, seven eighths of all codes and scales.
    assert sent == 2 * 2 * 7 / 8 * sum(leaf.size for leaf in packed)
    # In 16 bits: rows of the embedding, and hidden states and their gradients at the loss. No weight.
    bf16 = {(each.op, each.elements) for each in found if each.dtype == "bfloat16"}
    assert all(elements % 4096 == 0 and elements <= 8 * 2048 * 4096 for _, elements in bf16)
    assert sum(each.sent(sizes) for each in found if each.dtype == "bfloat16") < 0.1 * sent


def test_data_sends_gradients_once_an_update() -> None:
    sent = sent_bytes(step_collectives(run(data=8), LLAMA_3_8B, BF16, "full"), run(data=8))
    adapters = 41_943_040
    assert sent.keys() == {"data"}
    # The loss and the count of learnt tokens beside them.
    assert sent["data"] == 2 * 7 / 8 * 4 * (adapters + 2)
    assert step_collectives(run(), LLAMA_3_8B, BF16, "full") == []


def test_between_hosts_a_mesh_of_both_sends_an_eighth() -> None:
    config = run(batch_size=64, data=8, fsdp=8)
    sent = sent_bytes(step_collectives(config, LLAMA_3_8B, BF16, "full"), config)
    alone = sent_bytes(step_collectives(run(data=8), LLAMA_3_8B, BF16, "full"), run(data=8))
    np.testing.assert_allclose(sent["data"], alone["data"] / 8, rtol=1e-6)
