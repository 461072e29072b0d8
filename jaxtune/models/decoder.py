"""The one decoder: token ids in, hidden states out. Families differ by data (DecoderConfig and the tree), not by code
here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from jaxtune.linear import Adaptation, linear, split_key
from jaxtune.models.attention import Cache, self_attention
from jaxtune.models.config import DecoderConfig
from jaxtune.models.context import Context
from pallas_kernels.glu import glu
from pallas_kernels.rms_norm import rms_norm

Tree = Mapping[str, Any]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def embed(frozen: Tree, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """Rows of the embedding table, in the compute dtype."""
    return frozen["embed_tokens"]["embedding"][tokens].astype(dtype)


def head_weight(frozen: Tree) -> Float[Array, "V D"]:
    """The output head: its own matrix, or the embedding table where the two are tied."""
    return frozen["lm_head"]["kernel"] if "lm_head" in frozen else frozen["embed_tokens"]["embedding"]


def mlp(
    h: Float[Array, "B T D"], base: Tree, adapter: Tree, context: Context, config: DecoderConfig, key: Array | None
) -> Float[Array, "B T D"]:
    """down(activation(gate(h)) * up(h)); `base` and `adapter` are this layer's `mlp` subtrees."""

    def project(index: int, name: str, x: Array) -> Array:
        return linear(x, base[name], adapter.get(name), context.adaptation, split_key(key, index))

    return project(
        6, "down_proj", glu(project(4, "gate_proj", h), project(5, "up_proj", h), activation=config.activation)
    )


def block(
    x: Float[Array, "B T D"],
    base: Tree,
    adapter: Tree,
    context: Context,
    config: DecoderConfig,
    key: Array | None = None,
    cache: Cache | None = None,
    layer: Array | int = 0,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """One layer: x plus attention, plus MLP, each on its normalised input.

    Args:
        x: [B, T, D], the residual stream.
        base, adapter: this layer's subtrees, without the layer axis; an adapter may be {} or lack any linear.
        key: of dropout in this layer, or None.
        cache: keys and values of all layers, or None in training. layer: this one's index there.

    Returns:
        The residual stream after the layer, and the cache with the new tokens.
    """
    x = checkpoint_name(x, "layer_input")
    h = rms_norm(x, base["input_layernorm"]["scale"], eps=config.norm_eps)
    attended, cache = self_attention(
        h, base["self_attn"], adapter.get("self_attn", {}), context, config, key, cache, layer
    )
    x = x + attended
    h = rms_norm(x, base["post_attention_layernorm"]["scale"], eps=config.norm_eps)
    return x + mlp(h, base["mlp"], adapter.get("mlp", {}), context, config, key), cache


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
    dropout_key: Array | None = None,
    remat: Wrap | None = None,
    unroll: bool = False,
    cache: Cache | None = None,
    cache_start: Array | int = 0,
    cache_first: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Run all layers and the final norm.

    Args:
        frozen, lora: the two parameter trees (see CONTRIBUTING); `lora` may be {}.
        tokens, positions: int32 [B, T]; positions start at 0 in each document.
        segment_ids: int32 [B, T], a number per document of a packed row, or None where every row is one document.
        dtype: compute dtype of activations and products.
        dropout_key: of this step; None switches dropout off.
        remat: wraps a layer so that its activations are recomputed in the backward pass (see jaxtune.remat).
        unroll: one program for all layers instead of a loop over one layer's: faster where nothing is recomputed, and
            slower to compile.
        cache: {"k", "v"}: [L, B, S, K, H]; new keys and values are written from index `cache_start` on.
        cache_first: index of each row's first token in the cache, where rows are padded in front.

    Returns:
        [B, T, D] ready for the head, and the cache.
    """
    cos, sin = config.rope.cos_sin(positions)
    context = Context(cos, sin, segment_ids, cache_start, adaptation, cache_first)

    # The cache is carried: as an input and output of the loop it would exist twice.
    def layer(carry: tuple[Array, Cache | None], inputs: tuple[Any, Any, Array]) -> tuple[Any, None]:
        (x, cache), (base, adapter, index) = carry, inputs
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return block(x, base, adapter, context, config, key, cache, index), None

    layers = (frozen["layers"], lora.get("layers", {}), jnp.arange(config.num_layers))
    start = (embed(frozen, tokens, dtype), cache)
    (x, cache), _ = lax.scan(remat(layer) if remat else layer, start, layers, unroll=unroll)
    return rms_norm(x, frozen["norm"]["scale"], eps=config.norm_eps), cache


def logits(frozen: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """float32 logits; for generation and tests (training never holds them, see pallas_kernels.cross_entropy)."""
    head = head_weight(frozen).astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
