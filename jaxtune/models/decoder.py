"""The one decoder: token ids in, hidden states out. Families differ by data (DecoderConfig and the tree), not by code
here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from jaxtune.linear import Adaptation, Fp8, Linears, split_key
from jaxtune.models.attention import self_attention
from jaxtune.models.config import DecoderConfig
from jaxtune.models.context import PLAIN, Cache, Context, Execution, Past
from jaxtune.models.from_inputs import Loops, from_inputs
from jaxtune.models.norm import norm
from jaxtune.models.rope import document_lengths
from jaxtune.parts import Parts
from pallas_kernels import StackLayer
from pallas_kernels.cross_entropy import Head, head_logits
from pallas_kernels.nf4 import NF4Layer, NF4Tensor

Tree = Mapping[str, Any]
# Each slice of an MLP is a piece of program of its own; of more tokens than they serve, some are taken at a time.
_MOST_SLICES = 8
# The norms that `norm_linear` takes in.
_BEFORE_LINEARS = "input_layernorm", "post_attention_layernorm"
# The residual stream, what is still to be added to it (or None), and the cache.
Carry = tuple[Array, Array | None, Cache | None]
# What sets layers apart beside their weights: how far their queries see, and what is computed in 8 bits.
Kind = tuple[int | None, Fp8 | None]
# Rows of a table in host memory that are on their way at once.
_ROWS_IN_FLIGHT = 16


def embed(
    frozen: Tree,
    tokens: Int[Array, "B T"],
    config: DecoderConfig,
    dtype: jnp.dtype,
    rows: Float[Array, "B T D"] | None = None,
) -> Float[Array, "B T D"]:
    """Rows of the embedding table, scaled where the family does so, in the compute dtype; `rows`: if they were taken
    already."""
    rows = (_rows(frozen["embed_tokens"]["embedding"], tokens) if rows is None else rows).astype(dtype)
    return rows if config.embedding_scale == 1.0 else rows * jnp.asarray(config.embedding_scale, dtype)


def _rows(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table on the device, or of one in host memory, which stays there."""
    if jax.typeof(table).memory_space != jax.memory.Space.Host:
        return table[tokens]

    # Row by row: slices are read from host memory where they lie, and for a gather all of it would be copied.
    def row(_: None, token: Array) -> tuple[None, Array]:
        at_host = lax.dynamic_slice_in_dim(table, token, 1)
        return None, jax.device_put(at_host, jax.memory.Space.Device)[0]

    _, rows = lax.scan(row, None, tokens.reshape(-1), unroll=min(tokens.size, _ROWS_IN_FLIGHT))
    return rows.reshape(*tokens.shape, -1)


def head_weight(frozen: Tree) -> Head:
    """The output head: its own matrix, dense or in fewer bits, or the embedding table where the two are tied."""
    return frozen["lm_head"]["kernel"] if "lm_head" in frozen else frozen["embed_tokens"]["embedding"]


def block(
    x: Float[Array, "B T D"],
    base: Tree,
    adapter: Tree,
    context: Context,
    config: DecoderConfig,
    key: Array | None = None,
    cache: Cache | None = None,
    layer: Array | int = 0,
    pending: Float[Array, "B T D"] | None = None,
) -> Carry:
    """One layer: x plus attention, plus MLP, each on its normalised input.

    Args:
        x: [B, T, D], the residual stream.
        base, adapter: this layer's subtrees, without the layer axis; an adapter may be {} or lack any linear.
        key: of dropout in this layer, or None.
        cache: keys and values of all layers, or None in training. layer: this one's index there.
        pending: what the layer before left to be added to x, which the first norm does on its way; None where layers
            add up their own.

    Returns:
        The residual stream after the layer, what is still to be added to it, and the cache with the new tokens.
    """
    x = checkpoint_name(x, "layer_input")
    attention = Linears(
        base["self_attn"],
        adapter.get("self_attn", {}),
        context.adaptation,
        split_key(key, 0),
        context.parts,
        context.fp8,
    )
    qkv, x = attention.after_norm(
        ("q_proj", "k_proj", "v_proj"), x, base["input_layernorm"], pending, **_norm_form(config), name="qkv"
    )
    attended, cache = self_attention(qkv, attention, context, config, cache, layer)
    if "attention_output_norm" in base:
        attended = norm(attended, base["attention_output_norm"], config)
    mlp_parts = partial(_mlp, base=base, adapter=adapter.get("mlp", {}), context=context, config=config)
    if pending is not None:
        return *mlp_parts(x, attended, split_key(key, 1)), cache

    def mlp(*arguments: Any, slices: int | None = None) -> Array:
        stream, out = mlp_parts(*arguments, slices=slices)
        return stream + out

    linears = Linears(base["mlp"], adapter.get("mlp", {}), context.adaptation, key, context.parts, context.fp8)
    if context.mlp_slices > 1 and (slices := linears.slices(x, context.mlp_slices)) > 1:
        return mlp(x + attended, None, split_key(key, 1), slices=slices), None, cache
    if context.mlp_chunk is None or x.shape[0] * x.shape[1] <= context.mlp_chunk:
        return mlp(x, attended, split_key(key, 1)), None, cache
    # Added before they are cut, which a product does while it writes: one array less in the loop and in its gradient.
    x, chunk = x + attended, context.mlp_chunk
    if slices := linears.slices(x, min(_MOST_SLICES, math.ceil(x.shape[0] * x.shape[1] / chunk))):
        chunk *= slices
    in_slices = partial(mlp, slices=slices or None)
    return _in_chunks(in_slices, x, split_key(key, 1), chunk, of_rows=context.parts is not None), None, cache


def _mlp(
    x: Float[Array, "B T D"],
    attended: Float[Array, "B T D"] | None,
    key: Array | None,
    *,
    base: Tree,
    adapter: Tree,
    context: Context,
    config: DecoderConfig,
    slices: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The residual stream with attention's output added, if it is not in there, and the MLP's, which is not; every
    token for itself. slices: of the MLP's width, one at a time."""
    mlp = Linears(base["mlp"], adapter, context.adaptation, key, context.parts, context.fp8, context.again)
    if slices is not None:
        out, x = mlp.in_slices(
            x, base["post_attention_layernorm"], config.activation, slices=slices, **_norm_form(config)
        )
    else:
        gate_up, x = mlp.after_norm(
            ("gate_proj", "up_proj"),
            x,
            base["post_attention_layernorm"],
            attended,
            **_norm_form(config),
            name="gate_up",
        )
        out = mlp.after_glu("down_proj", gate_up, config.activation)
    if "mlp_output_norm" in base:
        out = norm(out, base["mlp_output_norm"], config)
    return x, out


def _in_chunks(mlp: Callable[..., Array], x: Array, key: Array | None, chunk: int, *, of_rows: bool) -> Array:
    """`mlp` on at most `chunk` tokens at a time, each chunk recomputed in the backward pass.

    of_rows: a chunk has tokens of every row, so that rows may lie on several devices, for which each chunk is copied.
    """
    rows, length, width = x.shape if of_rows else (1, x.shape[0] * x.shape[1], x.shape[2])
    count = math.ceil(length / max(1, chunk // rows))
    if count == 1:
        return mlp(x, None, key)
    size = math.ceil(length / count)
    padded = jnp.pad(x.reshape(rows, length, width), ((0, 0), (0, count * size - length), (0, 0)))
    chunks = padded.reshape(rows, count, size, width).swapaxes(0, 1)

    def one(chunk: tuple[Array, Array]) -> Array:
        index, stream = chunk
        return mlp(stream, None, split_key(key, index))

    out = lax.map(jax.checkpoint(one, prevent_cse=False), (jnp.arange(count), chunks))
    return out.swapaxes(0, 1).reshape(rows, -1, width)[:, :length].reshape(x.shape)


def _norm_form(config: DecoderConfig) -> dict[str, Any]:
    return {"eps": config.norm_eps, "unit_offset": config.unit_offset_norms}


def hidden_states(
    frozen: Tree,
    lora: Tree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    config: DecoderConfig,
    adaptation: Adaptation,
    *,
    dtype: jnp.dtype,
    execution: Execution = PLAIN,
    dropout_key: Array | None = None,
    embedded: Float[Array, "B T D"] | None = None,
    past: Past | None = None,
    trained: Tree | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Run all layers and the final norm.

    Args:
        frozen, lora: the two parameter trees (see CONTRIBUTING); `lora` may be {}.
        tokens, positions: int32 [B, T]; positions start at 0 in each document.
        segment_ids: int32 [B, T], a number per document of a packed row, or None where every row is one document.
        dtype: compute dtype of activations and products.
        dropout_key: of this step; None switches dropout off.
        embedded: the tokens' rows of the embedding table, where `frozen` does not hold it.
        past: the cache of generation; None in training.
        trained: what is differentiated in place of `lora` (see `from_inputs`), where `execution.keeps` is set.

    Returns:
        [B, T, D] ready for the head, and the cache with the new tokens.
    """
    kinds = _kinds(config, execution.fp8)
    contexts = _contexts(kinds, positions, segment_ids, config, adaptation, execution, past)
    parts = execution.parts
    if embedded is None and parts is not None:
        embedded = parts.embedded(frozen["embed_tokens"]["embedding"], tokens)
    x = embed(frozen, tokens, config, dtype, embedded)
    # A step of generation is as long as its launches: what is small is read where it lies.
    one_token = past is not None and tokens.size == 1

    shared = frozen["layers"], [(c.cos, c.sin) for c in contexts.values()], segment_ids, dropout_key

    # The cache is carried: as an input and output of the loop it would exist twice. Weights are picked from their stack
    # inside of what is recomputed: what waits for the backward pass is the stack, and no layer's copy.
    def layer(shared: Any, carry: Carry, adapter: Any, index: Array, kind: Kind) -> Carry:
        x, pending, cache = carry
        stack, angles, segment_ids, dropout_key = shared
        cos, sin = angles[list(contexts).index(kind)]
        context = dataclasses.replace(contexts[kind], cos=cos, sin=sin, segment_ids=segment_ids)
        base = jax.tree.map(partial(_pick, index=index), stack, is_leaf=_is_packed)
        if one_token:
            adapter = jax.tree.map(lambda stack: StackLayer(stack, index), lora.get("layers", {}))
            base |= {name: {"scale": StackLayer(stack[name]["scale"], index)} for name in _BEFORE_LINEARS}
        if parts is not None:
            base, adapter = parts.layer(base, adapter)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return block(x, base, adapter, context, config, key, cache, index, pending)

    adapters, loops = lora.get("layers", {}), _loops(kinds, len(config.windows))
    if execution.keeps is not None:

        def without_cache(shared: Any, x: Array, adapter: Any, index: Array, kind: Kind) -> Array:
            return layer(shared, (x, None, None), adapter, index, kind)[0]

        plan = Loops(without_cache, loops, kinds, execution.keeps == "host", execution.unroll)
        x = from_inputs(plan, x, adapters, None if trained is None else trained.get("layers", {}), shared)
        return norm(x, frozen["norm"], config), None

    def scanned(carry: Carry, inputs: tuple[Any, Array], kind: Kind) -> tuple[Carry, None]:
        return layer(shared, carry, *inputs, kind), None

    wrapped = {kind: (execution.remat or _keep_all_but_weights)(partial(scanned, kind=kind)) for kind in contexts}

    def pattern(carry: Carry, inputs: Sequence[tuple[Any, Array]], kinds: Sequence[Kind]) -> tuple[Carry, None]:
        for kind, of_layer in zip(kinds, inputs, strict=True):
            carry, _ = wrapped[kind](carry, of_layer)
        return carry, None

    carry: Carry = x, jnp.zeros_like(x) if one_token else None, None if past is None else past.cache
    # Indices known at compile time: of an unrolled layer they are constants, and no launch.
    layers = {} if one_token else adapters, np.arange(config.num_layers, dtype=np.int32)
    for start, stop, period in loops:
        cuts = [slice(first, stop, period) for first in range(start, start + period)]
        patterns = [jax.tree.map(lambda leaf, cut=cut: leaf[cut], layers) for cut in cuts]
        in_order = partial(pattern, kinds=kinds[start : start + period])
        carry, _ = lax.scan(in_order, carry, patterns, unroll=execution.unroll)
    x, pending, cache = carry
    return norm(x if pending is None else x + pending, frozen["norm"], config), cache


def _kinds(config: DecoderConfig, fp8: Fp8 | None) -> list[Kind]:
    """Of each layer; layers are alike that see as far and are computed alike."""
    windows = (config.windows[i % len(config.windows)] for i in range(config.num_layers))
    return [(window, None if fp8 is not None and i in fp8.layers else fp8) for i, window in enumerate(windows)]


def _contexts(
    kinds: Sequence[Kind],
    positions: Array,
    segment_ids: Array | None,
    config: DecoderConfig,
    adaptation: Adaptation,
    execution: Execution,
    past: Past | None,
) -> dict[Kind, Context]:
    """What layers share, for each kind of them."""
    parts, (start, first) = execution.parts, (0, None) if past is None else (past.start, past.first)
    # In generation all tokens take the angles of a document that fills the cache, whatever is in it by now.
    lengths = _lengths(positions, segment_ids, parts) if past is None else jnp.full((1, 1), past.cache["k"].shape[2])
    contexts = {}
    for window, fp8 in dict.fromkeys(kinds):
        rope = config.local_rope if window is not None and config.local_rope is not None else config.rope
        cos, sin = rope.cos_sin(positions, lengths)
        contexts[window, fp8] = Context(
            cos,
            sin,
            segment_ids,
            start,
            adaptation,
            cache_first=first,
            window=window,
            mlp_chunk=execution.mlp_chunk,
            mlp_slices=execution.mlp_slices,
            parts=parts,
            fp8=fp8,
            deterministic=execution.deterministic,
            again=execution.keeps is not None,
        )
    return contexts


def _loops(kinds: Sequence[Kind], period: int) -> list[tuple[int, int, int]]:
    """Cuts layers into loops over patterns of `period` of them, as long as kinds are repeated: (start, stop, period).

    Layers that make no whole pattern are one of their own.
    """
    loops, start, count = [], 0, len(kinds)
    while start < count:
        size = min(period, count - start)
        stop = start + size
        while kinds[start : start + size] == kinds[stop : stop + size]:
            stop += size
        loops.append((start, stop, size))
        start = stop
    return loops


def _lengths(positions: Array, segment_ids: Array | None, parts: Parts | None) -> Array:
    if parts is None:
        return document_lengths(positions, segment_ids)
    rows = parts.rows(positions)
    assert rows is not None
    return parts.own_tokens(document_lengths(rows, parts.rows(segment_ids)))


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, NF4Tensor)


def _pick(leaf: Any, index: Array) -> Any:
    """One layer of a stack; of a packed weight a reference to it, which its decoding follows."""
    return NF4Layer(leaf, index) if _is_packed(leaf) else lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _keep_all_but_weights(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Recompute nothing but the choice of a layer's weights from the stack, and their gathering."""
    picking = (lax.dynamic_slice_p, lax.squeeze_p, lax.all_gather_p)
    return jax.checkpoint(layer, prevent_cse=False, policy=lambda primitive, *_, **__: primitive not in picking)


def logits(frozen: Tree, hidden: Float[Array, "B T D"], config: DecoderConfig) -> Float[Array, "B T V"]:
    """float32 logits; for generation and tests (training never holds them, see pallas_kernels.cross_entropy)."""
    raw = head_logits(hidden, head_weight(frozen))
    return raw if config.logit_cap is None else config.logit_cap * jnp.tanh(raw / config.logit_cap)
