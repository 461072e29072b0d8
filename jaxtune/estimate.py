"""What one step of a run takes of a device, by a formula: for devices that are not here to compile for.

The parts that stand between steps (weights, adapters, optimizer) are exact: they are added up from the arrays' shapes.
The rest follows XLA's buffers in its three moments: the backward pass through the last layer, the loss, and the
optimizer. Widths are counted in elements of the compute dtype per token (F MLP width, D model width, Q and K the widths
of all query and of all key heads of a layer); `_KEPT`, `_LAYER`, `_DECODED` and `_UPDATE` were fitted to what XLA
allocates on an H200 for Llama shapes of 1B, 8B and 13B, at 128 to 65,536 tokens and ranks of 8 to 256 (docs/memory.md
has the comparison). A device at hand should be compiled for instead.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtune.config import RunConfig
from jaxtune.devices import Device
from jaxtune.loading import resolve_dtype
from jaxtune.models.config import DecoderConfig
from jaxtune.remat import MLP_CHUNK, NARROW_GRADIENTS, OFFLOADED, POLICIES, UNROLLED
from jaxtune.structure import frozen_structure, state_structure, tree_bytes
from pallas_kernels.cross_entropy import chunk_tokens

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclasses.dataclass(frozen=True)
class Widths:
    """Elements per token of a layer's arrays, by whose width they have."""

    mlp: float
    model: float
    queries: float
    keys: float


# What a layer keeps for its backward pass: with "none" the inputs of every op that is not made again.
_KEPT = {
    "none": Widths(mlp=3.0, model=4.5, queries=2.0, keys=2.0),
    "selective": Widths(mlp=0.0, model=2.0, queries=2.0, keys=2.0),
    "full": Widths(mlp=0.0, model=1.0, queries=0.0, keys=0.0),
    "offload": Widths(mlp=0.0, model=0.0, queries=0.0, keys=0.0),
    "lean": Widths(mlp=0.0, model=0.0, queries=0.0, keys=0.0),
}
# The same where the fused blocks run (norm_linear, glu_linear): they make their norms and units again.
_KEPT_FUSED = _KEPT | {
    "none": Widths(mlp=2.0, model=2.6, queries=2.0, keys=2.0),
    "selective": Widths(mlp=0.0, model=2.6, queries=2.0, keys=2.0),
}
_FUSED_CAPABILITY = 8.0
# What exists at once while one layer is differentiated: where it is computed again first, and where all was kept.
_LAYER_RECOMPUTED = Widths(mlp=3.0, model=7.0, queries=1.0, keys=2.4)
_LAYER_SELECTIVE = Widths(mlp=2.0, model=0.0, queries=0.0, keys=0.0)
_LAYER_KEPT = Widths(mlp=2.6, model=0.0, queries=0.0, keys=0.0)
_LAYER_KEPT_FUSED = Widths(mlp=1.0, model=0.0, queries=0.0, keys=0.0)
# 16-bit weights at once: the widest ones of a layer, or whole layers where layers are unrolled.
_DECODED_WEIGHTS = 0.6
_DECODED_LAYERS_UNROLLED = 8.0
_HEAD_ROWS_BYTES = 64 * 2**20
# Gradients, and what the optimizer makes of them before the adapter is written.
_UPDATE = 1.25
# Queries at a time of the attention that runs without cuDNN, and the largest mask that cuDNN is given.
_ATTENTION_SLICE = 512
_MASK_BUDGET_BYTES = 512 * 2**20
# Share of the data sheet's matrix rate and bandwidth that was seen, and elements read or written per token and layer
# beside the products, in units of F + D: from the step of Llama-3-8B on an H200.
_RATE_SHARE, _BANDWIDTH_SHARE = 0.75, 0.75
_TRAFFIC = 53.0
# What products of 2,048 rows with a packed weight take beyond those of 8,192, which decode it once (H200: 361 us for a
# quarter of 1,215; benchmarks/results/nvidia-h200/kernels.json).
_IN_PIECES = 0.19
# The interpreter, JAX and its libraries in the host's memory.
_HOST_PROCESS = {"gpu": 2 * 2**30, "cpu": 640 * 2**20}
# Of a step's memory on the device, as people read it.
_PARTS = {
    "weights": "frozen weights",
    "adapters": "adapters",
    "optimizer": "optimizer state",
    "kept": "activations kept for the backward pass",
    "gradients": "gradients",
    "layer": "backward pass of one layer",
    "decoded": "decoded 4-bit weights",
    "logits": "or, in another moment: the loss",
    "update": "or, in another moment: the update",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by component, and on the host.

    weights, adapters, optimizer: between steps. kept: activations that wait for their backward pass. gradients: of the
    adapters, and their sums where several micro-batches are added up. layer: the backward pass of one layer. decoded:
    16-bit copies of 4-bit weights. logits: the loss of one chunk of tokens. update: the optimizer's moment. host: the
    process, and what `offload` keeps there. compiled: XLA's peak of the whole step, where it was compiled.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    kept: int
    layer: int
    decoded: int
    logits: int
    update: int
    host: int
    compiled: int | None = None

    @property
    def parts(self) -> dict[str, int]:
        """The components of the device's memory, by what they are called to people."""
        return {text: getattr(self, name) for name, text in _PARTS.items()}

    @property
    def resident(self) -> int:
        """Between steps."""
        return self.weights + self.adapters + self.optimizer

    @property
    def estimate(self) -> int:
        """In the fullest moment of a step, by the formula."""
        backward = self.kept + self.gradients + self.layer + self.decoded
        return self.resident + max(backward, self.kept + self.logits, self.update)

    @property
    def peak(self) -> int:
        """In the fullest moment of a step: as compiled where it was."""
        return self.estimate if self.compiled is None else self.compiled

    def fits(self, device: Device) -> bool:
        """Whether a device has as much; of the host's memory only where that is the device's own, which a limit of what
        the run takes of its GPU leaves out."""
        whole = dataclasses.replace(device, allocator=None).usable
        return self.peak <= device.usable and (not device.shared or self.peak + self.host <= whole)


@dataclasses.dataclass(frozen=True)
class Model:
    """What the estimates of one run share, whatever its batch, length and policy.

    parameters, trainable: counts. weights, adapters, optimizer: bytes. linears: elements of one layer's linears;
    widest: of the largest of them. packed: whether they are held in 4 bits.
    """

    decoder: DecoderConfig
    parameters: int
    trainable: int
    weights: int
    adapters: int
    optimizer: int
    linears: int
    widest: int
    packed: bool


def measure_model(config: RunConfig, hf_config: dict[str, Any], dtype: str) -> Model:
    """Add up a run's weights, adapters and optimizer state, held or computed in `dtype` (bf16, fp16 or fp32)."""
    numpy_dtype = resolve_dtype(dtype)
    decoder = DecoderConfig.from_hf(hf_config)
    frozen = frozen_structure(hf_config, config.model, numpy_dtype)
    whole = dataclasses.replace(config.model, load_in_4bit=False, head="dtype", embedding_on_host=False)
    one_a_byte = frozen_structure(hf_config, whole, "uint8")
    state = state_structure(config, decoder, numpy_dtype)
    sizes = [out * into for out, into in decoder.linear_shapes().values()]
    return Model(
        decoder,
        parameters=tree_bytes(one_a_byte),
        trainable=tree_bytes(state.lora) // {"fp32": 4, "bf16": 2}[config.lora.dtype],
        weights=tree_bytes(frozen),
        adapters=tree_bytes(state.lora),
        optimizer=tree_bytes(state.opt_state),
        linears=sum(sizes),
        widest=max(sizes),
        packed=config.model.load_in_4bit,
    )


def estimate_memory(config: RunConfig, model: Model, device: Device, dtype: str, policy: str) -> Memory:
    """The memory of one step under a policy of `remat.POLICIES`."""
    assert policy in POLICIES, policy
    decoder, size = model.decoder, _SIZES[dtype]
    rows = config.train.batch_size // (config.mesh.data * config.mesh.fsdp)
    # Along fsdp and tensor each device keeps its share of weights, adapters, state and vocabulary.
    tensor, spread = config.mesh.tensor, config.mesh.fsdp * config.mesh.tensor
    tokens = rows * (config.data.max_length // config.mesh.sequence)

    def bytes_of(widths: Widths, in_mlp: int = tokens) -> int:
        heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
        outside = widths.model * decoder.hidden_size + (widths.queries * heads[0] + widths.keys * heads[1]) / tensor
        return int(size * (tokens * outside + in_mlp * widths.mlp * decoder.intermediate_size / tensor))

    fused = model.packed and device.capability is not None and device.capability >= _FUSED_CAPABILITY
    unrolled = policy in UNROLLED and device.capability is not None
    # In the adapter's dtype; their sums over micro-batches, and what the optimizer takes, are float32. Unrolled layers
    # are fullest before the first of them is differentiated.
    gradients = model.adapters // (decoder.num_layers if unrolled and fused else 1)
    if policy in NARROW_GRADIENTS and config.mesh.devices == 1 and dtype != "fp16":
        gradients = min(gradients, 2 * model.trainable)
    sums = 4 * model.trainable if config.train.gradient_accumulation_steps > 1 else 0
    moments = {"none": _LAYER_KEPT_FUSED if fused else _LAYER_KEPT, "selective": _LAYER_SELECTIVE}
    in_mlp = min(tokens, MLP_CHUNK.get(policy, tokens))
    layer = bytes_of(moments.get(policy, _LAYER_RECOMPUTED), in_mlp)
    layer += _attention_scratch(config, decoder, device, rows)
    if config.mesh.fsdp > 1 and model.packed:
        # The packed weights of a layer, gathered: half a byte an element, and its scale.
        layer += int(0.53 * model.linears / tensor)
    kept = decoder.num_layers * bytes_of((_KEPT_FUSED if fused else _KEPT)[policy])
    if config.lora.lora_dropout > 0:
        # The mask of the widest input, a byte an element, and the random bits that it is made of.
        layer += 5 * in_mlp * decoder.intermediate_size
        if policy == "none":
            # XLA finds the masks of both passes equal and keeps them; fused blocks leave it more than the mask itself.
            inputs = sum(into for _, into in decoder.linear_shapes().values())
            kept += decoder.num_layers * tokens * inputs * (3 if fused else 1)
    several = unrolled and not fused
    decoded_elements = _DECODED_LAYERS_UNROLLED * model.linears if several else _DECODED_WEIGHTS * model.widest
    if _in_fp8(config, device):
        # In the backward pass, the fullest moment, weights at a byte an element, and the rounded gradient of the widest
        # product, gate's and up's.
        decoded_elements, layer = decoded_elements / 2, layer + 2 * in_mlp * decoder.intermediate_size // tensor
    words = decoder.vocab_size // spread
    chunk = min(tokens * config.mesh.fsdp, config.train.loss_chunk or chunk_tokens(words))
    offloaded = model.optimizer if config.train.is_paged else 0
    if config.model.embedding_on_host:
        offloaded += size * decoder.vocab_size * decoder.hidden_size
    offloaded += decoder.num_layers * size * tokens * decoder.hidden_size if policy in OFFLOADED else 0
    return Memory(
        weights=model.weights // spread,
        adapters=model.adapters // spread,
        optimizer=0 if config.train.is_paged else model.optimizer // spread,
        gradients=(gradients + sums) // spread,
        kept=kept,
        layer=layer,
        decoded=int(size * decoded_elements / tensor) if model.packed else 0,
        # Logits in float32, their gradient in 16 bits, and the hidden states in the order they are learnt in.
        logits=6 * chunk * words + _decoded_head(config, decoder, size) + 4 * size * tokens * decoder.hidden_size,
        update=int(_UPDATE * 4 * model.trainable / spread) + (model.optimizer if config.train.is_paged else 0),
        host=_HOST_PROCESS["cpu" if device.capability is None else "gpu"] + offloaded,
    )


def _decoded_head(config: RunConfig, decoder: DecoderConfig, size: int) -> int:
    """Of a head in 8 or 4 bits: the rows that are decoded at a time, and of NF4 a scale of each block in float32."""
    if config.model.head == "dtype":
        return 0
    elements = decoder.vocab_size * decoder.hidden_size
    return min(_HEAD_ROWS_BYTES, size * elements) + (elements // 16 if config.model.head == "nf4" else 0)


def _in_fp8(config: RunConfig, device: Device) -> bool:
    # A card that has no products in 8 bits is judged as if it were not asked for them.
    return config.train.compute != "dtype" and device.has_fp8


def _attention_scratch(config: RunConfig, decoder: DecoderConfig, device: Device, rows: int) -> int:
    """What attention needs beside its inputs and outputs: cuDNN a mask of packed rows, XLA the scores of a slice."""
    length = config.data.max_length
    mask = 2 * rows * length * length if config.data.packing else 0
    if device.capability is not None and device.capability >= 8.0 and mask <= _MASK_BUDGET_BYTES:
        return mask
    return 2 * 4 * rows * decoder.num_heads * min(_ATTENTION_SLICE, length) * length


def step_flops(config: RunConfig, model: Model, policy: str) -> float:
    """Floating-point operations of one update, every place of every row counted.

    Forward and backward pass of the frozen linears (4 for each weight and token: no gradient of the weight is made), of
    the adapters (6), of causal attention and of the head; what a policy computes again, twice.
    """
    decoder, train = model.decoder, config.train
    tokens = train.batch_size * train.gradient_accumulation_steps * config.data.max_length
    forward = 2 * decoder.num_layers * model.linears + 2 * model.trainable
    attention = 2 * decoder.num_layers * config.data.max_length * decoder.num_heads * decoder.head_dim
    head = 4 * decoder.vocab_size * decoder.hidden_size
    shapes = decoder.linear_shapes()
    gate_up = 2 * decoder.num_layers * sum(math.prod(shapes[name]) for name in ("gate_proj", "up_proj"))
    again = {"none": 0, "selective": gate_up}.get(policy, forward + attention)
    return tokens * (2 * forward + 2 * model.trainable + 3.5 * attention + head + again)


def step_seconds(config: RunConfig, model: Model, device: Device, dtype: str, policy: str) -> float:
    """Time of one update: matrix products at a share of the data sheet's rate, then the traffic between them.

    seconds = flops / (0.75 * rate) + bytes / (0.75 * bandwidth); where `offload`'s copies take longer than all of that,
    their time; and with a paged optimizer the time of its state's way to the device and back. One card and one model
    were measured: elsewhere it is a guess within a factor of about 1.5.
    """
    decoder, train = model.decoder, config.train
    tokens = train.batch_size * train.gradient_accumulation_steps * config.data.max_length
    widths = decoder.intermediate_size + decoder.hidden_size
    traffic = _TRAFFIC * tokens * decoder.num_layers * widths * _SIZES[dtype]
    flops = step_flops(config, model, policy)
    if _in_fp8(config, device):
        # The frozen linears at twice the rate: their gradients, forward, and where all of a layer is computed again.
        forward = 0 if train.compute == "fp8_backward" else 1 if policy in ("none", "selective") else 2
        flops -= tokens * model.linears * decoder.num_layers * (1 + forward)
    if policy == "lean":
        shapes = decoder.linear_shapes()
        mlp = sum(math.prod(shapes[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        flops += _IN_PIECES * 3 * 2 * tokens * decoder.num_layers * mlp
    busy = flops / (_RATE_SHARE * device.flops) + traffic / (_BANDWIDTH_SHARE * device.bandwidth)
    copied = 2 * decoder.num_layers * tokens * decoder.hidden_size * _SIZES[dtype] if policy in OFFLOADED else 0
    paged = 2 * model.optimizer / device.host_bandwidth if train.is_paged else 0.0
    return max(busy, copied / device.host_bandwidth) / config.mesh.devices + paged


def largest(config: RunConfig, model: Model, device: Device, dtype: str, policy: str, *, what: str) -> int:
    """The largest `batch_size` at the run's length, or the longest `max_length` of one row, that fits; 0 for none."""
    devices = config.mesh.data * config.mesh.fsdp

    def fits(count: int) -> bool:
        if what == "batch_size":
            changed = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=count * devices))
        else:
            changed = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, batch_size=devices),
                data=dataclasses.replace(config.data, max_length=count),
            )
        return estimate_memory(changed, model, device, dtype, policy).fits(device)

    # A batch counts rows a device; a length counts in 256 tokens, since nobody needs it closer.
    unit = 1 if what == "batch_size" else 256
    if not fits(unit):
        return 0
    low, high = 1, 2
    while fits(high * unit) and high * unit < 2**22:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit * (devices if what == "batch_size" else 1)
