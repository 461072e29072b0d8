"""Whether this process is one of several of a run, from the command's arguments or a launcher's variables.

Imports neither JAX nor anything slow: what is wrong is answered at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from jaxtune.errors import UserError

_ALL_THREE = "--coordinator, --processes and --process-id belong together"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process among those of a run.

    processes: of the run, 2 or more. process: this one's number, from 0. coordinator: HOST:PORT where process 0
    listens; None where JAX finds it in the launcher's variables. launcher: slurm, ompi (Open MPI), or None where the
    command's arguments say all. device: the one device of its host that this process takes, None for every one that it
    sees.
    """

    processes: int
    process: int
    coordinator: str | None
    launcher: str | None = None
    device: int | None = None

    def describe(self) -> str:
        """For the log."""
        by = {None: "the command's arguments", "slurm": "Slurm's variables", "ompi": "Open MPI's variables"}
        devices = "all devices it sees" if self.device is None else f"device {self.device} of its host"
        return f"process {self.process} of {self.processes}, by {by[self.launcher]}; it takes {devices}"


def find_launch(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> Launch | None:
    """The launch that arguments or environment describe; None for a run of one process.

    Without arguments, a launcher counts that says there is more than one task: the Slurm step that this process belongs
    to (srun), or Open MPI. A coordinator alone adds to what a launcher says.

    Raises:
        UserError: a part is missing or out of range.
    """
    if processes is None and process is None:
        launch = _of_launcher(environment)
        if launch is not None:
            return launch if coordinator is None else dataclasses.replace(launch, coordinator=_address(coordinator))
        if coordinator is None:
            return None
    if coordinator is None or processes is None or process is None:
        raise UserError(f"{_ALL_THREE}; give all of them (a coordinator alone is enough under srun or mpirun)")
    if processes < 1:
        raise UserError(f"--processes is {processes}; set it to the number of processes of the run, 1 or more")
    if not 0 <= process < processes:
        raise UserError(f"--process-id is {process}; of {processes} processes each has its own, 0 to {processes - 1}")
    address = _address(coordinator)
    return None if processes == 1 else Launch(processes, process, address)


def _address(text: str) -> str:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/]+):(\d{1,5})", text)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(f"--coordinator is {text!r}; write the host of process 0 and a free port there, as HOST:12345")
    return text


def _of_launcher(environment: Mapping[str, str]) -> Launch | None:
    def number(name: str) -> int | None:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else None

    # Slurm's other variables also stand in the batch script itself, which is one process.
    steps = number("SLURM_STEP_NUM_TASKS"), number("SLURM_PROCID"), number("SLURM_LOCALID")
    ranks = tuple(number(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK"))
    for launcher, (tasks, task, local) in (("ompi", ranks), ("slurm", steps)):
        if tasks is not None and tasks > 1 and task is not None:
            device = local if _shares_host(launcher, environment) else None
            return Launch(tasks, task, None, launcher, device)
    return None


def _shares_host(launcher: str, environment: Mapping[str, str]) -> bool:
    """Whether other tasks are on this host and see the same GPUs, so that each has to take its own."""
    if len(environment.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and environment.get("CUDA_VISIBLE_DEVICES"):
        return False
    if launcher == "ompi":
        return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != "1"
    # As in 4 or 2(x3),1: tasks of each host of the step.
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return set(counts) != {"1"}
