"""The cases of `python -m pallas_kernels.bench --headline` as PyTorch's systems compute them; see `kernel_rows.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
RANK, SCALING = 64, 2.0

Function = Callable[..., Any]


class Case(NamedTuple):
    """A row of the bench, and what computes it here: (system, name) -> function of the inputs.

    make: -> inputs, made anew for each set. truth: inputs in float32 -> results, or None where nothing is compared.
    once: whether a set is used once, because results are written over it.
    """

    op: str
    name: str
    m: int | None
    work: str
    make: Callable[[], tuple[Any, ...]]
    truth: Function | None
    functions: dict[tuple[str, str], Function]
    once: bool = False


class Shape(NamedTuple):
    """Sizes of Llama-3-8B at 4 x 2,048 tokens, or small ones to try this file with."""

    tokens: int = 8192
    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    vocabulary: int = 128256
    layers: int = 32


SMALL = Shape(64, 128, 256, 4, 2, 32, 500, 1)


def normal(shape: Any, device: str, scale: float = 1.0, dtype: Any = None) -> Any:
    """Random values of this standard deviation, bfloat16 unless told."""

    return (torch.randn(shape, device=device) * scale).to(dtype or torch.bfloat16)


def packed_layer(n: int, k: int, device: str) -> Any:
    """bitsandbytes' layer of a random [n, k] weight, NF4 with double quantisation."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    weight = normal((n, k), device, k**-0.5)
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.weight = packed.to(device)
    return layer


def unrounded(layer: Any) -> Any:
    """The layer's weight as its bytes mean it, float32."""
    import bitsandbytes.functional as bnb_functional

    state = layer.weight.quant_state
    kept, state.dtype = state.dtype, torch.float32
    try:
        return bnb_functional.dequantize_4bit(layer.weight.data, state)
    finally:
        state.dtype = kept


def gradients(f: Function, wrt: int) -> Function:
    """(inputs..., cotangent) -> f(inputs), and its gradients for the first `wrt` of them."""

    def run(*inputs: Any) -> Any:
        *inputs, dy = inputs
        for x in inputs[:wrt]:
            x.requires_grad_()
        y = f(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs[:wrt], dy.to(y.dtype))

    return run


def without_gradients(f: Function) -> Function:
    """f, nothing kept for a backward pass."""

    return torch.no_grad()(f)


def nf4_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """Decoding, and products of few and many rows with a packed weight."""
    import bitsandbytes.functional as bnb_functional

    n, k = s.mlp, s.hidden

    def decoded(layer: Any) -> Any:
        return bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    def make() -> tuple[Any, ...]:
        return (packed_layer(n, k, device),)

    functions: dict[tuple[str, str], Function] = {("bitsandbytes", "dequantize_4bit"): decoded}
    if kernels is not None:
        functions["unsloth", "fast_dequantize"] = lambda w: kernels.fast_dequantize(w.weight, w.weight.quant_state)
    yield Case("nf4", "llama-3-8b/gate_proj", None, FORWARD, make, unrounded, functions)
    for m in (1, 16, 64, 256, 512, 2048, s.tokens):

        def make_product(m: int = m) -> tuple[Any, ...]:
            return normal((m, 1, k) if m <= 64 else (1, m, k), device), packed_layer(n, k, device)

        def make_dense(m: int = m) -> tuple[Any, ...]:
            return normal((m, k), device), normal((n, k), device, k**-0.5)

        functions = {("bitsandbytes", "Linear4bit"): without_gradients(lambda x, layer: layer(x))}
        if kernels is not None:
            unsloths = without_gradients(lambda x, layer: kernels.fast_linear_forward(layer, x))
            functions["unsloth", "fast_linear_forward"] = unsloths
        case = "nf4_matmul", "llama-3-8b/gate_proj", m, FORWARD
        yield Case(*case, make_product, lambda x, layer: F.linear(x, unrounded(layer)), functions)
        yield Case(*case, make_dense, F.linear, {("torch", "bf16 weight"): F.linear})


def norm_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """RMSNorm, forward and backward."""

    class Norm:
        variance_epsilon = 1e-5

        def __init__(self, weight: Any) -> None:
            self.weight = weight

    def make() -> tuple[Any, ...]:
        return normal((1, s.tokens, s.hidden), device), 1 + normal(s.hidden, device, 0.1)

    def reference(x: Any, weight: Any) -> Any:
        return F.rms_norm(x, (s.hidden,), weight, 1e-5)

    forms: dict[tuple[str, str], Function] = {("torch", "rms_norm"): reference}
    if kernels is not None:
        forms["unsloth", "fast_rms_layernorm"] = lambda x, w: kernels.fast_rms_layernorm(Norm(w), x)
    forward = {name: without_gradients(f) for name, f in forms.items()}
    yield Case("rms_norm", "llama-3-8b", s.tokens, FORWARD, make, reference, forward)

    # The graph is made with the inputs, so that its backward pass is timed alone; each function has its own.
    for name, f in forms.items():

        def make_graph(f: Function = f) -> tuple[Any, ...]:
            x, weight = make()
            x.requires_grad_()
            return f(x, weight), x, weight, torch.randn_like(x)

        def backward(y: Any, x: Any, weight: Any, dy: Any) -> Any:
            return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

        def truth(y: Any, x: Any, weight: Any, dy: Any) -> Any:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(reference(x, weight), x, dy)[0]

        yield Case("rms_norm", "llama-3-8b", s.tokens, BACKWARD, make_graph, truth, {name: backward})


def rope_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """Queries and keys of four rows, in one call."""

    b, t = 4, s.tokens // 4

    def make() -> tuple[Any, ...]:
        q, k = (normal((b, t, n, s.width), device).transpose(1, 2) for n in (s.heads, s.kv_heads))
        angles = torch.outer(
            torch.arange(t, device=device), 500000.0 ** -(torch.arange(0, 1, 2 / s.width, device=device))
        )
        angles = torch.cat([angles, angles], -1)
        return q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def eager(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        def rotated(x: Any) -> Any:
            half = x.shape[-1] // 2
            return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

        return rotated(q), rotated(k)

    functions: dict[tuple[str, str], Function] = {("torch", "eager"): eager}
    if kernels is not None:
        # In place: a set is used once.
        functions["unsloth", "fast_rope_embedding, in place"] = without_gradients(kernels.fast_rope_embedding)
    yield Case("rope", "llama-3-8b", s.tokens, FORWARD, make, eager, functions, once=True)


def glu_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """Gated units, forward and backward over their inputs."""

    activations = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}
    named = {"silu": "swiglu_fg", "gelu_tanh": "geglu_approx_forward", "gelu": "geglu_exact_forward"}
    backward_named = {"silu": "swiglu_DWf_DW_dfg", "gelu_tanh": "geglu_approx_backward", "gelu": "geglu_exact_backward"}

    def make() -> tuple[Any, ...]:
        return tuple(normal((1, s.tokens, s.mlp), device) for _ in range(2))

    def make_backward() -> tuple[Any, ...]:
        return tuple(normal((s.tokens, s.mlp), device) for _ in range(3))

    for name, activation in activations.items():

        def forward(gate: Any, up: Any, activation: Function = activation) -> Any:
            return activation(gate) * up

        def backward(dh: Any, gate: Any, up: Any, forward: Function = forward) -> Any:
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            h = forward(gate, up)
            return h.detach(), *torch.autograd.grad(h, (gate, up), dh)

        functions: dict[tuple[str, str], Function] = {("torch", "eager"): forward}
        if kernels is not None:
            functions["unsloth", named[name]] = getattr(kernels, f"{named[name]}_kernel")
        yield Case("glu", f"llama-3-8b/{name}", s.tokens, FORWARD, make, forward, functions)
        if kernels is not None:
            # Its three results are the unit, the gradient of up and that of gate; ours gate before up.
            written = getattr(kernels, f"{backward_named[name]}_kernel")

            def ordered(dh: Any, gate: Any, up: Any, written: Function = written) -> tuple[Any, ...]:
                h, d_up, d_gate = written(dh, gate, up)
                return h, d_gate, d_up

            functions = {("unsloth", backward_named[name]): ordered}
            yield Case("glu", f"llama-3-8b/{name}", s.tokens, BACKWARD, make_backward, backward, functions, once=True)


def adam_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """One update of rank-64 adapters on all linears, each of the tensors a parameter of its own, as it is in PEFT."""
    import bitsandbytes as bnb

    kv, q = s.kv_heads * s.width, s.heads * s.width
    h, f = s.hidden, s.mlp
    linears = [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)]
    shapes = [shape for n, k in linears for shape in ((RANK, k), (n, RANK))] * s.layers

    def make(optimizer: Function) -> tuple[Any, ...]:
        parameters = [torch.nn.Parameter(normal(shape, device, 0.02, torch.float32)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return (optimizer(parameters, lr=1e-3, weight_decay=0.01),)

    makers: dict[tuple[str, str], Function] = {
        ("bitsandbytes", "AdamW8bit"): bnb.optim.AdamW8bit,
        ("torch", "AdamW, fused, 32-bit state"): lambda *a, **k: torch.optim.AdamW(*a, fused=True, **k),
    }
    count = sum(n * k for n, k in shapes)
    for name, maker in makers.items():
        step = {name: lambda optimizer: optimizer.step()}
        yield Case("adam8bit", "llama-3-8b", count, FORWARD, lambda maker=maker: make(maker), None, step)


def attention_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """Whole rows through cuDNN and FlashAttention; four documents a row through FlashAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    b, t = 4, s.tokens // 4
    cuts = [0, t // 8, 3 * t // 8, t // 2, t]

    def make(counts: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(normal((b, t, n, s.width), device).transpose(1, 2) for n in counts)

    def whole(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def by_document(q: Any, k: Any, v: Any) -> Any:
        spans = itertools.pairwise(cuts)
        return torch.cat([whole(*(x[:, :, i:j] for x in (q, k, v))) for i, j in spans], dim=2)

    def through(backend: Any) -> Function:
        def run(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(backend):
                return whole(q, k, v)

        return run

    ends = torch.tensor([i * t + c for i in range(b) for c in cuts[:-1]] + [b * t], dtype=torch.int32, device=device)
    longest = max(j - i for i, j in itertools.pairwise(cuts))

    def varlen(q: Any, k: Any, v: Any) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        flat = [x.transpose(1, 2).reshape(b * t, -1, s.width) for x in (q, k, v)]
        out = varlen_attn(*flat, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)
        return out.view(b, t, -1, s.width).transpose(1, 2)

    counts = (s.heads, s.kv_heads, s.kv_heads)
    whole_rows = {
        ("torch", "cuDNN"): through(SDPBackend.CUDNN_ATTENTION),
        ("torch", "FlashAttention"): through(SDPBackend.FLASH_ATTENTION),
    }
    for name, functions, truth in (
        ("causal", whole_rows, whole),
        ("packed", {("torch", "FlashAttention, varlen"): varlen}, by_document),
    ):
        forward = {key: without_gradients(f) for key, f in functions.items()}
        both = {key: gradients(f, 3) for key, f in functions.items()}
        case = f"llama-3-8b/{name}"
        yield Case("attention", case, s.tokens, FORWARD, lambda: make(counts), truth, forward)
        yield Case("attention", case, s.tokens, BOTH, lambda: make((*counts, s.heads)), gradients(truth, 3), both)


def lora_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """One adapted linear."""

    if kernels is None:
        return
    from unsloth.kernels.fast_lora import LoRA_W

    n, k = s.mlp, s.hidden

    def make() -> tuple[Any, ...]:
        a, b = normal((RANK, k), device, k**-0.5, torch.float32), normal((n, RANK), device, 0.1, torch.float32)
        return normal((1, s.tokens, k), device), a, b, packed_layer(n, k, device)

    def make_both() -> tuple[Any, ...]:
        return *make(), normal((1, s.tokens, n), device)

    def adapted(x: Any, a: Any, b: Any, layer: Any) -> Any:
        return LoRA_W.apply(x, layer.weight, layer.weight.quant_state, a, b, SCALING)

    def truth(x: Any, a: Any, b: Any, layer: Any) -> Any:
        return F.linear(x, unrounded(layer)) + SCALING * F.linear(F.linear(x, a), b)

    name = ("unsloth", "LoRA_W")
    case = "lora_linear", "llama-3-8b/gate_proj", s.tokens
    yield Case(*case, FORWARD, make, truth, {name: without_gradients(adapted)})
    yield Case(*case, BOTH, make_both, gradients(truth, 3), {name: gradients(adapted, 3)})


def loss_cases(s: Shape, device: str, kernels: Any) -> Iterator[Case]:
    """Head and mean cross-entropy, forward and backward, the head frozen."""

    def make() -> tuple[Any, ...]:
        targets = torch.randint(0, s.vocabulary, (1, s.tokens), device=device)
        head = normal((s.vocabulary, s.hidden), device, 0.02)
        return normal((1, s.tokens, s.hidden), device), head, targets

    def eager(hidden: Any, head: Any, targets: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, head).float()[0], targets[0])

    def with_gradient(f: Function) -> Function:
        def run(hidden: Any, head: Any, targets: Any) -> Any:
            hidden.requires_grad_()
            loss = f(hidden, head, targets)
            return loss.detach(), torch.autograd.grad(loss, hidden)[0]

        return run

    def truth(hidden: Any, head: Any, targets: Any) -> Any:
        loss, pieces = torch.zeros((), device=device), []
        for x, y in zip(hidden.split(1024, dim=1), targets.split(1024, dim=1), strict=True):
            x = x.detach().requires_grad_()
            part = F.cross_entropy(F.linear(x, head)[0], y[0], reduction="sum") / s.tokens
            pieces.append(torch.autograd.grad(part, x)[0])
            loss = loss + part.detach()
        return loss, torch.cat(pieces, dim=1)

    forms: dict[tuple[str, str], Function] = {("torch", "eager"): eager}
    if kernels is not None:
        from cut_cross_entropy import linear_cross_entropy
        from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

        forms["unsloth", "fused_ce_loss"] = lambda hidden, head, targets: unsloth_fused_ce_loss(
            trainer=None,
            hidden_states=hidden,
            lm_head_weight=head,
            lm_head_bias=None,
            labels=targets,
            shift_labels=False,
        )
        forms["torch", "cut_cross_entropy"] = lambda hidden, head, targets: linear_cross_entropy(
            hidden[0], head, targets[0]
        )
    functions = {name: with_gradient(f) for name, f in forms.items()}
    yield Case("cross_entropy", "llama-3-8b", s.tokens, BOTH, make, truth, functions)


CASES = (nf4_cases, norm_cases, rope_cases, glu_cases, adam_cases, attention_cases, lora_cases, loss_cases)
