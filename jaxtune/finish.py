"""What a run writes at its end: the last checkpoint, and then the adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.base import BaseModel
from jaxtune.config import RunConfig
from jaxtune.export import save_peft_adapter
from jaxtune.metrics import Progress
from jaxtune.processes import is_first, whole
from jaxtune.run_directory import RunDirectory
from jaxtune.step import TrainState


def save_last(
    save_state: Callable[[], None],
    state: TrainState,
    config: RunConfig,
    base: BaseModel,
    directory: RunDirectory,
    progress: Progress,
) -> Any:
    """Write the last checkpoint, and by the first process its adapter; with `output.keep_best` also the best adapter.

    One after the other: whatever forbids an adapter, the checkpoint is there.

    Args:
        save_state: writes the checkpoint.

    Returns:
        The trained tree, whole.
    """
    save_state()
    checkpoints, lora = directory.checkpoints, whole(state.lora)
    best = checkpoints.best() if config.output.keep_best else []
    of_best = [(meta, whole(then.lora)) for then, meta in (checkpoints.restore(step, state) for step in best[:1])]
    if not is_first():
        return lora
    of_base: Any = {"decoder": base.decoder, "modules": base.modules, "tokenizer": base.own_tokenizer}

    def save(name: str, tree: Any) -> None:
        with directory.replacing(name) as temporary:
            save_peft_adapter(temporary, tree, config.lora, base.source, **of_base)

    save("adapter", lora)
    for meta, tree in of_best:
        save("adapter-best", tree)
        progress.note(f"adapter-best: of step {meta['step']}, held-out loss {meta['eval_loss']:.4f}")
    return lora
