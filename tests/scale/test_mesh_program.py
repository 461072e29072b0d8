"""A run on several meshes is the run on one device: losses, gradients, curves; and what its program sends and holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("mesh_program.py")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    # What these programs take is compiled, not computed.
    flags = "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    environment = {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, PROGRAM],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_device(found: dict[str, Any]) -> None:
    for case, (here, one, gradient_error) in found["compared"].items():
        for scalar in ("loss", "grad_norm", "eval"):
            np.testing.assert_allclose(here[scalar], one[scalar], rtol=1e-5, err_msg=f"{case}: {scalar}")
        assert gradient_error < 1e-5, case


@pytest.mark.slow
def test_a_run_goes_on_from_eight_devices_to_two_and_one(found: dict[str, Any]) -> None:
    one, spread = found["curves"]["one"], found["curves"]["spread"]
    assert len(one) == len(spread) == 20
    assert one[-1] < one[0] - 0.5
    np.testing.assert_allclose(spread, one, atol=1e-4)


# What a step of two micro-batches over two layers with seven linears sends, once for each array: per layer, pass and
# micro-batch 14 codes and scales, 14 adapters; back 14 gradients of adapters. A change here is a change of every run's
# traffic.
LAYERS = 2 * 2
COLLECTIVES = {
    "one": {},
    # 14 gradients, the loss, and the count of learnt tokens.
    "data=2": {"all-reduce float32 over data": 14 + 2},
    "fsdp=2": {
        # Tokens in two visits to the embedding; targets.
        "all-gather int32 over fsdp": 2 * 2 + 2,
        "all-gather uint8 over fsdp": 2 * LAYERS * 14,
        # Adapters; hidden states and weights of the loss.
        "all-gather float32 over fsdp": 2 * LAYERS * 14 + 2 * 2,
        # Gradients of adapters; rows of the embedding; gradients of hidden states.
        "reduce-scatter float32 over fsdp": LAYERS * 14 + 2 * 2 + 2,
        "all-reduce int32 over fsdp": 2,
        # Maxima and sums of the loss; loss and count; the gradient's norm.
        "all-reduce float32 over fsdp": 2 * 2 + 2 + 1,
    },
    "tensor=2": {
        "all-gather float32 over tensor": 2 * LAYERS * 14,
        "reduce-scatter float32 over tensor": LAYERS * 14,
        # Behind o_proj and down_proj, of which the second pass needs the first alone, and in front of both blocks in
        # the backward pass; embedding, maxima, sums and gradient of the loss; the norm.
        "all-reduce float32 over tensor": LAYERS * (2 + 1 + 2) + 2 * 4 + 1,
    },
    "sequence=2": {
        # The documents of whole rows, in each pass through attention.
        "all-gather int32 over sequence": 2 * LAYERS,
        "all-to-all float32 over sequence": 3 * 4 * LAYERS,
        "all-reduce float32 over sequence": 14 + 2,
    },
    # Cut in both ways: scales that the tensor axis would part are float32, adapters are in one part for each device.
    "data=2 fsdp=2 tensor=2": {
        "all-gather int32 over fsdp": 2 * 2 + 2,
        "all-gather uint8 over fsdp": 2 * LAYERS * 7,
        "all-gather float32 over fsdp": 2 * LAYERS * 7 + 2 * 2,
        "all-gather float32 over tensor+fsdp": 2 * LAYERS * 14,
        "reduce-scatter float32 over tensor+fsdp": LAYERS * 14,
        "reduce-scatter float32 over fsdp": 2 * 2 + 2,
        "all-reduce int32 over fsdp": 2,
        "all-reduce float32 over tensor": LAYERS * 5 + 2 * 2 + 2,
        "all-reduce float32 over tensor+fsdp": 2 * 2 + 1,
        "all-reduce float32 over data": 14,
        "all-reduce float32 over data+fsdp": 2,
    },
}


@pytest.mark.slow
def test_a_model_is_loaded_in_parts(found: dict[str, Any]) -> None:
    """Over 4 x 2 devices; the largest tensors are gate, up and down, of 128 x 512 float32."""
    loaded, largest = found["loaded"], 128 * 512 * 4
    assert loaded["same"]
    assert loaded["cut alike"]
    assert loaded["device"] < 1.1 * loaded["whole"] / 8
    assert loaded["device at most"] <= loaded["device"] + largest
    # A tensor as read and what quantising takes; all weights as they are read are 45 such tensors.
    assert loaded["host at most"] < 12 * largest


@pytest.mark.slow
def test_the_health_check_knows_the_mesh(found: dict[str, Any]) -> None:
    checked = found["checked"]
    assert checked["devices"] == 8
    assert checked["mesh"] in ({"data": 8 // n, "fsdp": n, "tensor": 1, "sequence": 1} for n in (1, 2, 4, 8))
    assert checked["bytes_per_second"] > 1e6


@pytest.mark.slow
def test_collectives_and_bytes_of_a_step(found: dict[str, Any]) -> None:
    found = found["programs"]
    for mesh, expected in COLLECTIVES.items():
        assert found[mesh]["collectives"] == expected, mesh
    whole = found["one"]["held"]
    assert found["data=2"]["held"] == found["sequence=2"]["held"] == whole
    # Norms and the outermost scales are everywhere; scales that a cut would part are float32, half a bit an element.
    assert found["fsdp=2"]["held"] < 1.01 * whole / 2
    assert found["fsdp=8"]["held"] < 1.05 * whole / 8
    assert found["tensor=2"]["held"] < 1.05 * whole / 2
    # The compiled program's own count: the batch and buffers' alignment on top.
    assert found["fsdp=8"]["arguments"] < 1.1 * whole / 8
    # The least weight has 64 x 64 elements. As such it never travels, packed it does; what travels as float32 are
    # adapters (up to 128 x 8), and for the loss 8 rows of 4 hidden states of width 64, and their weights.
    gathered = {(dtype, size) for dtype, size in found["fsdp=8"]["gathered"]}
    assert {size for dtype, size in gathered if dtype == "u8"} == {64, 128, 2048, 4096}
    assert {size for dtype, size in gathered if dtype == "f32"} == {8 * 4, 64 * 8, 128 * 8, 8 * 4 * 64}
