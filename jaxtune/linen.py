"""The decoder as a Flax Linen module: for programs that want `module.apply` on a tree that `--to flax` wrote.

    variables = convert.flax_tree.load_tree(Path("exported"))
    logits = Decoder(DecoderConfig.from_hf(hf_config)).apply(variables, tokens)

It holds no parameters of its own making: `init` is for modules that train from scratch, which this one does not.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxtune.linear import Adaptation
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import hidden_states, logits


class Decoder(nn.Module):
    """Logits of the one decoder over variables {"params": frozen, "lora": adapter, if any}.

    config: the model's. dtype: compute dtype. adaptation: how the adapter acts.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    adaptation: Adaptation = Adaptation()

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segment_ids: Int[jax.Array, "B T"] | None = None,
    ) -> Float[jax.Array, "B T V"]:
        """float32 logits.

        Args:
            tokens: ids.
            positions: of each token in its document; by default each row is one document.
            segment_ids: a number per document of a packed row; None where every row is one document.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        frozen, lora = self.variables["params"], self.variables.get("lora", {})
        hidden, _ = hidden_states(
            frozen, lora, tokens, positions, segment_ids, self.config, self.adaptation, dtype=jnp.dtype(self.dtype)
        )
        return logits(frozen, hidden, self.config)
