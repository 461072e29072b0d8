"""8-bit AdamW against bitsandbytes on the CPU: maps, codes, single updates, and whole trajectories.

bitsandbytes' CPU quantiser finds the nearest entry only approximately (small second moments may land seven codes off),
so codes are held to "never farther than its", and trajectories are compared with its optimizer given an exact search.
"""

from __future__ import annotations

import bitsandbytes.backends.cpu.ops as cpu_ops
import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from jaxtune.optim import Moments32, adamw_8bit
from pallas_kernels.adam8bit import Moments8bit, adam8bit, dequantize_blockwise, dynamic_map, quantize_blockwise

EPS = np.finfo(np.float32).eps
HYPER = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05}


def gradients(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 over several decades."""
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 0, shape)).astype(np.float32)


def to_jax(x: torch.Tensor) -> jax.Array:
    """A copy that later changes in place do not reach."""
    return jnp.asarray(x.detach().numpy().copy())


def bitsandbytes_adamw(param: torch.nn.Parameter, rate: float) -> AdamW8bit:
    return AdamW8bit([param], rate, (HYPER["b1"], HYPER["b2"]), HYPER["eps"], HYPER["weight_decay"], min_8bit_size=4096)


def bitsandbytes_moments(optimizer: AdamW8bit, param: torch.nn.Parameter) -> Moments8bit:
    state = optimizer.state[param]
    return Moments8bit(*(to_jax(state[name].flatten()) for name in ("state1", "absmax1", "state2", "absmax2")))


def decode(moments: Moments8bit, signed: bool) -> np.ndarray:
    """One of the moments in float64."""
    codes, absmax = (np.asarray(x) for x in (moments[:2] if signed else moments[2:]))
    return dynamic_map(signed).astype(np.float64)[codes] * np.repeat(absmax.astype(np.float64), 256)[: codes.size]


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_equal_bit_for_bit(signed: bool) -> None:
    np.testing.assert_array_equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("p", [1, 256, 20_001])
def test_codes_are_never_farther(signed: bool, p: int) -> None:
    x = gradients(np.random.default_rng(p), (p,))
    x = x if signed else np.square(x)
    codes, absmax = quantize_blockwise(jnp.asarray(x), signed=signed)
    their_codes, state = bnb.quantize_blockwise(
        torch.from_numpy(x), bnb.create_dynamic_map(signed=signed), blocksize=256
    )
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    entries = dynamic_map(signed).astype(np.float64)
    normal = x / np.repeat(np.asarray(absmax), 256)[:p].astype(np.float64)
    ours, theirs = (np.abs(entries[c] - normal) for c in (np.asarray(codes), their_codes.numpy()))
    # Both divide in float32 first, ours perhaps with another last bit.
    assert (ours <= theirs + EPS * np.abs(normal)).all()
    # Where the entries are coarse, the approximate search seldom errs.
    large = np.abs(normal) > 0.1
    assert (np.asarray(codes) != their_codes.numpy())[large].mean() < 0.02
    back = dequantize_blockwise(to_jax(their_codes), absmax, signed=signed)
    np.testing.assert_array_equal(back, bnb.dequantize_blockwise(their_codes, state).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_update_equals_theirs_from_the_same_state(dtype: torch.dtype) -> None:
    rng, size = np.random.default_rng(0), 4096 + 100
    param = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(size).astype(np.float32)).to(dtype))
    theirs = bitsandbytes_adamw(param, 1e-2)
    moments = Moments8bit(*(jnp.zeros(n, t) for n, t in ((size, "u1"), (17, "f4"), (size, "u1"), (17, "f4"))))
    for step in range(1, 51):
        before = to_jax(param.float())
        grad = torch.from_numpy(gradients(rng, (size,))).to(dtype)
        update, ours = adam8bit(
            to_jax(grad.float()), moments, before, step=jnp.int32(step), learning_rate=1e-2, **HYPER
        )
        param.grad = grad
        theirs.step()
        after = before + update
        if dtype == torch.bfloat16:
            # Float32 results an ulp apart may round to neighbours in bfloat16, seldom.
            rounded, expected = np.asarray(after.astype(jnp.bfloat16), np.float32), to_jax(param.float())
            np.testing.assert_allclose(rounded, expected, rtol=2**-7)
            assert (rounded != expected).mean() < 1e-3
        else:
            np.testing.assert_allclose(after, to_jax(param), rtol=4 * EPS, atol=4 * EPS * 1e-2)
        decoded = [decode(moments, signed) for signed in (True, False)]
        moments = bitsandbytes_moments(theirs, param)
        g = grad.double().numpy()
        for signed, old, power in ((True, decoded[0], g), (False, decoded[1], g * g)):
            beta = HYPER["b1"] if signed else HYPER["b2"]
            exact = beta * old + (1 - beta) * power
            absmax, their_absmax = (np.asarray(x[1 if signed else 3]) for x in (ours, moments))
            np.testing.assert_allclose(absmax, their_absmax, rtol=4 * EPS)
            farther = np.abs(decode(ours, signed) - exact) - np.abs(decode(moments, signed) - exact)
            assert (farther <= 8 * EPS * np.repeat(their_absmax, 256)[:size]).all()


def test_trajectory_with_an_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(x: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, block_size: int) -> None:
        blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block_size)).view(-1, block_size)
        absmax.copy_(blocks.abs().amax(dim=1))
        codes = torch.bucketize(blocks / absmax[:, None], (code[1:] + code[:-1]) / 2).flatten()[: x.numel()]
        out.copy_(codes.view(out.shape))

    monkeypatch.setattr(cpu_ops, "_quant_blockwise_fp32_direct", exact)
    rng, rate, layers, shape = np.random.default_rng(1), 1e-2, 3, (8, 600)
    start = rng.standard_normal((layers, *shape)).astype(np.float32)
    small = rng.standard_normal((layers, 40, 100)).astype(np.float32)
    params = {"layers": {"a": jnp.asarray(start), "b": jnp.asarray(small)}}
    ours = adamw_8bit(rate, **HYPER)
    state = ours.init(params)
    assert isinstance(state.moments["layers"]["a"], Moments8bit)
    assert isinstance(state.moments["layers"]["b"], Moments32), "4,000 elements a layer: kept in float32, as theirs"
    theirs = {
        name: [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in stack]
        for name, stack in (("a", start), ("b", small))
    }
    optimizers = {name: [bitsandbytes_adamw(p, rate) for p in stack] for name, stack in theirs.items()}
    update = jax.jit(ours.update)
    for _ in range(50):
        grads = {name: gradients(rng, (layers, *stack[0].shape)) for name, stack in theirs.items()}
        updates, state = update({"layers": jax.tree.map(jnp.asarray, grads)}, state, params)
        params = optax.apply_updates(params, updates)
        for name, stack in theirs.items():
            for layer, param in enumerate(stack):
                param.grad = torch.from_numpy(grads[name][layer])
                optimizers[name][layer].step()
    for name, stack in theirs.items():
        expected = np.stack([p.detach().numpy() for p in stack])
        # Three roundings of the parameter an update, theirs and ours together, and about ten of what is added to it.
        bound = 50 * EPS * (1.5 * np.abs(expected) + 10 * rate)
        error = np.abs(np.asarray(params["layers"][name]) - expected)
        # A moment that lies on a midpoint but for its last bit may take either code.
        assert (error > bound).mean() < 1e-3
        assert error.max() < rate
