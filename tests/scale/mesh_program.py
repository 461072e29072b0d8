"""What one run computes on several meshes of 8 CPU devices; run by test_mesh_program.py, prints one line of JSON.

With --every-mesh: losses and gradients alone, on each axis for itself and on mixes of two and three, packed and whole.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=.:tests/support \
        python tests/scale/mesh_program.py --every-mesh
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from runs import CONFIG, save_model
from tiny import accumulated, decoder_config, frozen_tree, lora_tree, packed_batch, random_documents

from jaxtune.checkpoint import Checkpoints
from jaxtune.collectives import collectives
from jaxtune.config import LoraConfig, ModelConfig
from jaxtune.devices import this_device
from jaxtune.health import check_mesh
from jaxtune.linear import Adaptation
from jaxtune.loading import load_model
from jaxtune.mesh import make_parts, place, placing, split_linears
from jaxtune.models.config import DecoderConfig
from jaxtune.optim import adamw_8bit
from jaxtune.step import StepConfig, batch_sharding, init_state, jit_eval_step, jit_train_step, make_mesh

# Every width is a multiple of what the meshes cut it by, and blocks of 64 elements and of 256 moments stay whole.
DECODER = decoder_config(
    vocab_size=136, hidden_size=64, intermediate_size=128, num_heads=8, num_kv_heads=4, head_dim=16, num_layers=2
)
LENGTHS = [40, 33, 21, 38, 39, 12, 17, 40, 31, 25, 38, 29, 40, 40, 11, 35, 22]
# Rows of several documents, one padded, two micro-batches of eight rows each.
PACKED = {
    name: values.reshape(2, 8, 48)
    for name, values in packed_batch(DECODER, random_documents(DECODER, LENGTHS), rows=16, length=48).items()
}
WHOLE = {
    name: values.reshape(2, 8, 40)
    for name, values in packed_batch(DECODER, random_documents(DECODER, [40] * 16), rows=16, length=40).items()
}
ONE_EACH = accumulated(packed_batch(DECODER, random_documents(decoder_config(), [40] * 8), rows=8, length=40))
CASES: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = {
    "packed, accumulated, dropout": (
        {"batch": PACKED, "rate": 0.3},
        [{"fsdp": 2, "tensor": 2, "sequence": 2}],
    ),
    "one document a row, dense, tied": (
        {
            "batch": ONE_EACH,
            "nf4": False,
            "packed": False,
            "remat": "none",
            "tie_word_embeddings": True,
            "num_layers": 1,
        },
        [{"data": 2, "fsdp": 2, "tensor": 2}],
    ),
    # 101 words give no equal shares, a rank of 3 cannot be cut; there are biases, and norms of each head.
    "awkward": (
        {"batch": ONE_EACH, "vocab_size": 101, "num_kv_heads": 2, "rank": 3, "extras": True, "num_layers": 1}
        | {"remat": "selective"},
        [{"fsdp": 2, "tensor": 2}],
    ),
}


MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
ALONE = [{"data": 8}, {"fsdp": 8}, {"tensor": 2}, {"sequence": 4}]
PAIRS = [{"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}, {"fsdp": 2, "sequence": 4}, {"tensor": 2, "sequence": 2}]
TRIPLES = [MIXED, {"data": 2, "fsdp": 2, "sequence": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}]
EVERY_MESH: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = {
    "packed, accumulated": ({"batch": PACKED}, [*ALONE, *PAIRS, *TRIPLES]),
    "whole, accumulated": ({"batch": WHOLE, "packed": False}, [*ALONE, *PAIRS, *TRIPLES]),
}


class Run:
    """One run on one mesh, before its first step."""

    def __init__(
        self,
        axes: dict[str, int],
        *,
        batch: dict[str, np.ndarray],
        rate: float = 0.0,
        nf4: bool = True,
        packed: bool = True,
        remat: str = "full",
        extras: bool = False,
        rank: int = 8,
        optimizer: optax.GradientTransformation | None = None,
        **changes: Any,
    ) -> None:
        decoder = dataclasses.replace(DECODER, **changes)
        self.mesh, optimizer = make_mesh(**axes), optimizer or optax.sgd(1.0)
        frozen = frozen_tree(decoder, nf4=nf4)
        if extras:
            rng = np.random.default_rng(7)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                width = decoder.linear_shapes()[name][0]
                bias = rng.normal(size=(decoder.num_layers, width)).astype(np.float32)
                frozen["layers"]["self_attn"][name]["bias"] = jnp.asarray(bias)
            scale = 1 + rng.normal(size=(2, decoder.num_layers, decoder.head_dim)).astype(np.float32)
            frozen["layers"]["self_attn"] |= {"q_norm": {"scale": scale[0]}, "k_norm": {"scale": scale[1]}}
        self.frozen = split_linears(frozen, axes.get("tensor", 1))
        self.state = init_state(lora_tree(decoder, LoraConfig(r=rank, lora_alpha=16)), optimizer, 0, jnp.float32)
        self.parts = make_parts(self.mesh, self.frozen, self.state)
        specs = (P(), P()) if self.parts is None else (self.parts.state, self.parts.frozen)
        self.state, self.frozen = place(self.state, self.mesh, specs[0]), place(self.frozen, self.mesh, specs[1])
        self.batch = jax.device_put(batch, batch_sharding(self.mesh))
        self.config = StepConfig(
            decoder, Adaptation(2.0, rate), jnp.float32, packed=packed, remat=remat, loss_chunk=32, parts=self.parts
        )
        self.step: Any = jit_train_step(optimizer, self.config, self.mesh)

    def gradient(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The step's scalars, where there is dropout the held-out loss without it, and with SGD at a rate of 1 the
        gradient."""
        sums: tuple[jax.Array, ...] = ()
        if self.config.adaptation.dropout_rate > 0:
            held_out = {name: values[:1] for name, values in self.batch.items()}
            sums = jit_eval_step(self.config, self.mesh)(self.state.lora, self.frozen, held_out)
        before = jax.tree.map(np.asarray, self.state.lora)
        state, scalars = self.step(self.state, self.frozen, self.batch)
        leaves = jax.tree.leaves(jax.tree.map(lambda old, new: old - np.asarray(new), before, state.lora))
        return {**{k: float(v) for k, v in scalars.items()}, "eval": [float(x) for x in sums]}, leaves

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            self.state, scalars = self.step(self.state, self.frozen, self.batch)
            losses.append(float(scalars["loss"]))
        return losses


def name(axes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in axes.items()) or "one"


def compared(cases: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = CASES) -> dict[str, Any]:
    """Of each case and mesh: scalars here and on one device, and the largest relative error of any leaf's gradient."""
    found: dict[str, Any] = {}
    for case, (options, meshes) in cases.items():
        scalars_one, one = Run({}, **options).gradient()
        for axes in meshes:
            scalars, leaves = Run(axes, **options).gradient()
            error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(leaves, one, strict=True))
            found[f"{case}: {name(axes)}"] = [scalars, scalars_one, float(error)]
    return found


def curves() -> dict[str, Any]:
    """20 updates on one device; and on 8, 2 and 1 devices one after another, by way of checkpoints."""
    options = {"batch": {name: rows[:1] for name, rows in PACKED.items()}, "rate": 0.1, "num_layers": 1}
    # Every adapter of 1,024 elements has 8-bit moments, in four blocks; those of 512 keep float32 ones.
    optimizer = adamw_8bit(2e-3, min_8bit_size=1024)
    one = Run({}, optimizer=optimizer, **options).steps(20)
    spread: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory)
        for axes, count in ({"data": 2, "fsdp": 4}, 8), ({"fsdp": 2}, 6), ({}, 6):
            run = Run(axes, optimizer=optimizer, **options)
            if spread:
                run.state, _ = checkpoints.restore(len(spread), run.state)
            spread += run.steps(count)
            checkpoints.save(len(spread), run.state, {})
    return {"one": one, "spread": spread}


def programs() -> dict[str, Any]:
    """Collectives of a step as it is written, what the compiled one gathers, and bytes of a device."""
    found: dict[str, Any] = {}
    options = {"batch": PACKED, "optimizer": optax.adam(1e-3), "tie_word_embeddings": False}
    for axes in ({}, {"data": 2}, {"fsdp": 2}, {"fsdp": 8}, {"tensor": 2}, {"sequence": 2}, MIXED):
        run = Run(axes, **options)
        traced = run.step.trace(run.state, run.frozen, run.batch)
        counts: dict[str, int] = {}
        for each in collectives(traced):
            key = f"{each.op} {each.dtype} over {'+'.join(each.axes)}"
            counts[key] = counts.get(key, 0) + each.times
        record: dict[str, Any] = {"collectives": counts}
        held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((run.state, run.frozen))]
        record["held"] = sum(held)
        if axes == {"fsdp": 8}:
            compiled = traced.lower().compile()
            record["arguments"] = compiled.memory_analysis().argument_size_in_bytes
            shapes = re.findall(r"(\w+)\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
            record["gathered"] = sorted(
                {(dtype, int(np.prod([int(n) for n in dims.split(",") if n]))) for dtype, dims in shapes}
            )
        found[name(axes)] = record
    return found


def loaded() -> dict[str, Any]:
    """A model read over a mesh: whether it is the one that is read whole and then cut, and what it takes on the way."""
    config: dict[str, Any] = CONFIG | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 336}
    decoder, mesh, dtype = DecoderConfig.from_hf(config), make_mesh(fsdp=4, tensor=2), jnp.dtype(jnp.float32)
    device, held = jax.devices()[0], []

    def count(*_: int) -> None:
        # Each buffer once: a shard that was looked at is an array as well.
        shards = [shard for leaf in jax.live_arrays() for shard in leaf.addressable_shards if shard.device == device]
        held.append(sum({shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards}.values()))

    with tempfile.TemporaryDirectory() as name:
        model = ModelConfig(str(save_model(Path(name), **config)))
        whole = split_linears(load_model(model, dtype).frozen, 2)
        count()
        tracemalloc.start()
        frozen = load_model(model, dtype, place=placing(mesh, decoder), progress=count).frozen
        host = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    state = init_state(lora_tree(decoder, LoraConfig(r=8)), optax.sgd(1.0), 0, dtype)
    parts = make_parts(mesh, whole, state)
    assert parts is not None
    expected = place(whole, mesh, parts.frozen)
    assert jax.tree.structure(expected) == jax.tree.structure(frozen)
    pairs = list(zip(jax.tree.leaves(frozen), jax.tree.leaves(expected), strict=True))
    return {
        "same": all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs),
        "cut alike": all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs),
        "whole": sum(leaf.nbytes for leaf, _ in pairs),
        "device": sum(a.addressable_shards[0].data.nbytes for a, _ in pairs),
        "device at most": max(held) - held[0],
        "host at most": host,
    }


def checked() -> dict[str, Any]:
    """The health check's word on the mesh."""
    return dict(check_mesh(this_device()).values)


if __name__ == "__main__":
    if "--every-mesh" in sys.argv:
        found = compared(EVERY_MESH)
        for mesh, (here, one, error) in found.items():
            errors = [abs(here[name] / one[name] - 1) for name in ("loss", "grad_norm")]
            print(f"{mesh}: loss {errors[0]:.1e}, norm {errors[1]:.1e}, gradients {error:.1e}")
        worst = max(error for _, _, error in found.values())
        print(f"{len(found)} meshes and batches, gradients within {worst:.1e}")
        sys.exit(0 if worst < 1e-5 else 1)
    print(json.dumps({part.__name__: part() for part in (compared, curves, programs, loaded, checked)}))
