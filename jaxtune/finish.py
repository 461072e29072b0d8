"""What a run writes at its end: the last checkpoint and the adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.ahead import Beside
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

    The adapter is written at the same time, and takes its name when the checkpoint is complete: a run that has an
    adapter is not started again.

    Args:
        save_state: writes the checkpoint.

    Returns:
        The trained tree, whole.
    """
    checkpoints, lora = directory.checkpoints, whole(state.lora)
    of_base: Any = {"decoder": base.decoder, "modules": base.modules, "tokenizer": base.own_tokenizer}

    @contextlib.contextmanager
    def saved(name: str, tree: Any) -> Iterator[None]:
        def write(_: Any) -> None:
            save_peft_adapter(temporary, tree, config.lora, base.source, **of_base)

        with directory.replacing(name) as temporary, Beside(write) as adapter:
            yield
            adapter.result()

    with saved("adapter", lora) if is_first() else contextlib.nullcontext():
        save_state()
    best = checkpoints.best() if config.output.keep_best else []
    of_best = [(meta, whole(then.lora)) for then, meta in (checkpoints.restore(step, state) for step in best[:1])]
    for meta, tree in of_best if is_first() else ():
        with saved("adapter-best", tree):
            pass
        progress.note(f"adapter-best: of step {meta['step']}, held-out loss {meta['eval_loss']:.4f}")
    return lora
