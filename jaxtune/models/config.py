"""What the decoder needs to know of a model: sizes and choices, read from a Hugging Face config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of one decoder; the letters are those of CONTRIBUTING.

    model_type: the family. vocab_size: V. hidden_size: D. intermediate_size: F. num_layers: L. num_heads: N.
    num_kv_heads: K. head_dim: H. norm_eps: added to RMSNorm's mean square. activation: of the gated MLP.
    rope: rotary embedding. tie_word_embeddings: the head is the embedding table. max_position: longest context.
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a Hugging Face `config.json`, of old style (rope_theta, rope_scaling) or new (rope_parameters).

        Raises:
            UserError: a key is missing, or its value is one that the decoder does not implement.
        """
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if config.get(key) is None]
        if missing:
            raise UserError(
                f"config.json lacks {', '.join(missing)}: a decoder cannot be built without; complete the file"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise UserError(
                f"config.json: hidden_act {activation!r} is not implemented; known are {sorted(ACTIVATIONS)}"
            )
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        max_position = config.get("max_position_embeddings") or 2048
        return cls(
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=ACTIVATIONS[activation],
            rope=rope_from_hf(config, head_dim, max_position),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            max_position=max_position,
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
