"""Services that draw a run's numbers while it goes on: TensorBoard, Weights & Biases, trackio; none is needed.

Each is imported by its name, only where `output.report_to` asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxtune.errors import UserError

# What to install for each, and the module that is imported.
MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes a run's numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by name; they may be NaN or infinite."""

    def close(self) -> None:
        """The run is over, or was stopped."""


class TensorBoard:
    """Event files below `directory`, for `tensorboard --logdir`."""

    def __init__(self, module: Any, directory: Path) -> None:
        self._writer = module.SummaryWriter(logdir=str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Service:
    """A run of wandb or of trackio, whose modules have the same functions. Keys and addresses are the service's own
    settings (`wandb login`, WANDB_MODE=offline and the like)."""

    def __init__(self, module: Any, project: str, name: str, settings: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project=project, name=name, config=dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError, naming the command to run, where a service's package is not installed."""
    for name in names:
        _import(name)


def open_trackers(names: Sequence[str], directory: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Start the services of a run.

    Args:
        names: among tensorboard, wandb and trackio.
        directory: of the run; its name is the run's, its parent's the project's.
        settings: the configuration, as plain values.

    Raises:
        UserError: a service's package is not installed.
    """
    modules = {name: _import(name) for name in names}
    project, run = directory.absolute().parent.name or "jaxtune", directory.name
    return [
        TensorBoard(module, directory / "tensorboard")
        if name == "tensorboard"
        else Service(module, project, run, settings)
        for name, module in modules.items()
    ]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(
            f"output.report_to names {name}, but {MODULES[name]} cannot be imported ({error}); run: pip install "
            f'"jaxtune[{name}]"'
        ) from error
