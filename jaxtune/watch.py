"""Processes that watch each other: where one ends before its time, the others say so and end as well.

Each holds a TCP connection to process 0, which the system closes when a process dies, however it dies; to a host that
has vanished it is given up within half a minute. Without this, GPUs wait for the missing one without end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

# Exit status of a process that ends since another one has.
PEER_ENDED = 3
_CONNECT_SECONDS = 30.0
_GRACE_SECONDS = 1.0
_SILENT = "it was killed, or its host is gone"


class Watch:
    """One process's connections; `close` or `fail` ends them.

    process: its number. processes: of the run. end: called with the reason, from a thread, once another process has
    ended; the default prints it and ends this process at once with PEER_ENDED.
    """

    def __init__(self, process: int, processes: int, end: Callable[[str], None] | None = None) -> None:
        self._process, self._processes = process, processes
        self._end = end or _print_and_exit
        self._lock = threading.Lock()
        self._closed = False
        self._connections: dict[int, socket.socket] = {}

    def serve(self) -> tuple[int, str]:
        """Of process 0: wait for the others in the background. Returns a port, and a word that they have to say."""
        word = secrets.token_hex(16)
        server = socket.create_server(("", 0), backlog=self._processes)
        threading.Thread(target=self._accept, args=(server, word), name="jaxtune-watch", daemon=True).start()
        return server.getsockname()[1], word

    def connect(self, host: str, port: int, word: str) -> None:
        """Of the others: connect to process 0. Raises OSError where it cannot be reached."""
        connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        _send(connection, {"word": word, "process": self._process})
        self._follow(0, connection)

    def close(self) -> None:
        """All is well: say so to those who are connected."""
        self._leave({"bye": True})

    def fail(self, reason: str) -> None:
        """This process is about to end before its time: tell those who are connected why."""
        self._leave({"ended": self._process, "reason": reason})

    def _accept(self, server: socket.socket, word: str) -> None:
        with server:
            while len(self._connections) < self._processes - 1:
                connection, _ = server.accept()
                connection.settimeout(_CONNECT_SECONDS)
                try:
                    said = json.loads(connection.makefile().readline(1000))
                    number = said["process"] if secrets.compare_digest(said["word"], word) else None
                except (OSError, ValueError, KeyError, TypeError):
                    number = None
                if isinstance(number, int) and number not in self._connections:
                    self._follow(number, connection)
                else:
                    connection.close()

    def _follow(self, number: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connections[number] = connection
        threading.Thread(target=self._read, args=(number, connection), name="jaxtune-watch", daemon=True).start()

    def _read(self, number: int, connection: socket.socket) -> None:
        ended, reason = number, _SILENT
        try:
            if line := connection.makefile().readline():
                said = json.loads(line)
                if "bye" in said:
                    return
                ended, reason = said["ended"], said["reason"]
        except (OSError, ValueError):
            pass  # The connection is broken, which means the same as its end.
        if self._leave({"ended": ended, "reason": reason}):
            self._end(
                f"process {ended} of this run has ended ({reason}), and so does process {self._process}; what was "
                "saved is whole: start all processes again with --resume auto"
            )

    def _leave(self, message: dict[str, Any]) -> bool:
        """Send the last message to all; False where that was done before."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        for connection in list(self._connections.values()):
            _send(connection, message)
        if self._process == 0 and "ended" in message:
            # JAX aborts the others once process 0 is gone: they shall say why before.
            time.sleep(_GRACE_SECONDS)
        return True


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    # Who is gone need not be told.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _print_and_exit(reason: str) -> None:
    # The main thread may wait for the one that is gone, inside of a library that no exception reaches.
    os.write(2, f"\nerror: {reason}\n".encode())
    os._exit(PEER_ENDED)
