"""What the decoder needs to know of a model: sizes and choices, read from a Hugging Face config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.rope import RopeConfig, rope_from_hf

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


# The families that normalise with 1 + scale and multiply embeddings by sqrt(D).
_GEMMA = ("gemma", "gemma2", "gemma3_text")
# Whether a layer has a sliding window, in configs that do not list `layer_types`.
_SLIDING: dict[str, Callable[[Mapping[str, Any], int], bool]] = {
    "llama": lambda config, layer: False,
    "mistral": lambda config, layer: config.get("sliding_window") is not None,
    "qwen2": lambda config, layer: bool(config.get("use_sliding_window")) and layer >= config["max_window_layers"],
    "qwen3": lambda config, layer: bool(config.get("use_sliding_window")) and layer >= config["max_window_layers"],
    "gemma": lambda config, layer: False,
    "gemma2": lambda config, layer: layer % 2 == 0,
    "gemma3_text": lambda config, layer: (layer + 1) % (config.get("sliding_window_pattern") or 6) != 0,
    "phi3": lambda config, layer: config.get("sliding_window") is not None,
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of one decoder; the letters are those of CONTRIBUTING.

    model_type: the family. vocab_size: V. hidden_size: D. intermediate_size: F. num_layers: L. num_heads: N.
    num_kv_heads: K. head_dim: H. norm_eps: added to RMSNorm's mean square. activation: of the gated MLP.
    rope: rotary embedding. tie_word_embeddings: the head is the embedding table. max_position: longest context.
    windows: keys that a query of each layer sees, None for all: a pattern that repeats over the layers.
    local_rope: rotary embedding of the layers with a window; None for `rope`.
    attention_scale: factor on the scores; None for 1 / sqrt(H).
    attention_cap, logit_cap: soft-caps, cap * tanh(x / cap), of scores and logits; None for none.
    embedding_scale: factor on embeddings. unit_offset_norms: norms multiply by 1 + scale.

    What else differs between families is in the tree: biases, norms of queries and keys (q_norm, k_norm), and norms of
    what attention and MLP give (attention_output_norm, mlp_output_norm) act where they are.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    tie_word_embeddings: bool
    max_position: int
    windows: tuple[int | None, ...] = (None,)
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    unit_offset_norms: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a Hugging Face `config.json`, of old style (rope_theta, rope_scaling) or new (rope_parameters).

        Defaults that only a family's own class knows must have been filled in (`loading.read_hf_config` does).

        Raises:
            UserError: a key is missing, or its value is one that the decoder does not implement.
        """
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if config.get(key) is None]
        if missing:
            raise UserError(
                f"config.json lacks {', '.join(missing)}: a decoder cannot be built without; complete the file"
            )
        model_type = config["model_type"]
        if model_type not in _SLIDING:
            raise UserError(f"config.json: model_type {model_type!r} is not implemented; known are {sorted(_SLIDING)}")
        if config.get("use_bidirectional_attention"):
            raise UserError(
                "config.json: use_bidirectional_attention is set; only models that predict the next token can be "
                "trained: use one of those"
            )
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        max_position = config.get("max_position_embeddings") or 2048
        windows = _windows(config)
        is_gemma = model_type in _GEMMA
        scalar = config.get("query_pre_attn_scalar")
        return cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=_activation(config),
            rope=rope_from_hf(config, head_dim, max_position),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            max_position=max_position,
            windows=windows,
            local_rope=rope_from_hf(config, head_dim, max_position, "sliding_attention") if any(windows) else None,
            attention_scale=None if scalar is None else scalar**-0.5,
            attention_cap=config.get("attn_logit_softcapping"),
            logit_cap=config.get("final_logit_softcapping"),
            embedding_scale=config["hidden_size"] ** 0.5 if is_gemma else 1.0,
            unit_offset_norms=is_gemma,
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each of a layer's seven linears, by name."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        return {
            "q_proj": (self.num_heads * h, d),
            "k_proj": (self.num_kv_heads * h, d),
            "v_proj": (self.num_kv_heads * h, d),
            "o_proj": (d, self.num_heads * h),
            "gate_proj": (f, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
        }


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {name!r} is not implemented; known are {sorted(ACTIVATIONS)}")
    # Gemma's first files say gelu and mean the approximation.
    return "gelu_tanh" if name == "gelu" and config["model_type"] in _GEMMA else ACTIVATIONS[name]


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The shortest pattern of windows that repeats over the layers."""
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        sliding = _SLIDING[config["model_type"]]
        types = [_LAYER_TYPES[sliding(config, layer)] for layer in range(count)]
    if len(types) != count or not set(types) <= set(_LAYER_TYPES):
        raise UserError(
            f"config.json: layer_types must name {count} layers, each {' or '.join(_LAYER_TYPES)}; it has "
            f"{len(types)}: {sorted(set(types))}"
        )
    if "sliding_attention" in types and (not isinstance(window, int) or window < 1):
        raise UserError(f"config.json: there are layers with a sliding window, and sliding_window is {window!r}")
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    period = next(n for n in range(1, count + 1) if all(windows[i] == windows[i % n] for i in range(count)))
    return windows[:period]
