"""Who is one of several processes, from arguments and launchers' variables; and processes that watch each other."""

from __future__ import annotations

import queue
import re
import socket

import pytest

from jaxtune.errors import UserError
from jaxtune.launch import Launch, find_launch
from jaxtune.watch import Watch

SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
FOUND: dict[str, tuple[dict[str, str], Launch | None]] = {
    "nothing": ({}, None),
    "a batch script, which is no step": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
    "a step of one task": (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    "a task for each GPU": (SLURM, Launch(8, 5, None, "slurm", device=1)),
    "GPUs bound to tasks": (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, Launch(8, 5, None, "slurm")),
    "GPUs shared by tasks": (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Launch(8, 5, None, "slurm", device=1)),
    "a task for each host": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Launch(8, 5, None, "slurm")),
    "mpirun": (MPI, Launch(4, 2, None, "ompi", device=0)),
    "mpirun, one on each host": (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Launch(4, 2, None, "ompi")),
    "mpirun within a step": (SLURM | {"SLURM_STEP_NUM_TASKS": "2"} | MPI, Launch(4, 2, None, "ompi", device=0)),
    "mpirun of one": (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    "nonsense": (SLURM | {"SLURM_STEP_NUM_TASKS": "two"}, None),
}


@pytest.mark.parametrize(("environment", "launch"), FOUND.values(), ids=FOUND.keys())
def test_launchers(environment: dict[str, str], launch: Launch | None) -> None:
    assert find_launch(None, None, None, environment) == launch


def test_arguments() -> None:
    assert find_launch("host:1234", 2, 1, SLURM) == Launch(2, 1, "host:1234")
    assert find_launch("[::1]:1234", 2, 0, {}) == Launch(2, 0, "[::1]:1234")
    assert find_launch("host:1234", 1, 0, {}) is None
    launch = find_launch("host:1234", None, None, MPI)
    assert launch == Launch(4, 2, "host:1234", "ompi", device=0)
    assert launch.describe() == "process 2 of 4, by Open MPI's variables; it takes device 0 of its host"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "belong together"),
        (("host:1", 2, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("host:1", 0, 0), "--processes is 0"),
        (("host:1", 2, 2), "--process-id is 2; of 2 processes each has its own, 0 to 1"),
        (("host:1", 2, -1), "--process-id is -1"),
        (("host", 2, 0), "as HOST:12345"),
        (("host:70000", 2, 0), "as HOST:12345"),
        (("two words:80", 2, 0), "as HOST:12345"),
    ],
)
def test_what_is_wrong_is_named(arguments: tuple[str | None, int | None, int | None], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        find_launch(*arguments, {})


class Group:
    """Watches as three processes have them, all in this one."""

    def __init__(self) -> None:
        self.ends: queue.Queue[str] = queue.Queue()
        self.watches = [Watch(number, 3, self.ends.put) for number in range(3)]
        port, word = self.watches[0].serve()
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b'{"word": "guessed", "process": 1}\n')
            assert stranger.recv(1) == b""
        for watch in self.watches[1:]:
            watch.connect("127.0.0.1", port, word)
        while len(self.watches[0]._connections) < 2:
            pass

    def said(self, count: int) -> list[str]:
        return sorted(self.ends.get(timeout=10) for _ in range(count))


@pytest.mark.parametrize("who", [0, 2])
def test_all_others_hear_of_a_failure(who: int) -> None:
    group = Group()
    group.watches[who].fail("its disk is full")
    others = [number for number in range(3) if number != who]
    for other, text in zip(others, group.said(2), strict=True):
        assert text.startswith(f"process {who} of this run has ended (its disk is full), and so does process {other};")
    assert group.ends.empty()


def test_a_broken_connection_is_an_end() -> None:
    group = Group()
    group.watches[1]._connections[0].shutdown(socket.SHUT_RDWR)
    assert sum("process 1 of this run has ended (it was killed" in text for text in group.said(2 + 1)) == 2
    assert group.ends.empty()


def test_who_leaves_in_order_is_not_missed() -> None:
    group = Group()
    for watch in reversed(group.watches):
        watch.close()
    for watch in group.watches:
        watch.fail("too late to matter")
    assert group.ends.empty()
