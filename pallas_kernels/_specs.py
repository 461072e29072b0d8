"""Shapes of real models, by name: what tests, benchmarks and tuning of every op run on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes that a decoder's ops see, from the model's published config.json."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear layer of a block, by its name in the parameter tree."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.mlp, self.hidden),
            "up_proj": (self.mlp, self.hidden),
            "down_proj": (self.hidden, self.mlp),
        }


MODELS = {
    "llama-3-8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-70b": ModelShape(8192, 28672, 80, 64, 8, 128, 128256),
    "qwen3-0.6b": ModelShape(1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-4b": ModelShape(2560, 9728, 36, 32, 8, 128, 151936),
    "qwen3-14b": ModelShape(5120, 17408, 40, 40, 8, 128, 151936),
    "gemma-2-9b": ModelShape(3584, 14336, 42, 16, 8, 256, 256000),
    "gemma-3-4b": ModelShape(2560, 10240, 34, 8, 4, 256, 262208),
    "mistral-7b": ModelShape(4096, 14336, 32, 32, 8, 128, 32768),
    "smollm2-135m": ModelShape(576, 1536, 30, 9, 3, 64, 49152),
}
