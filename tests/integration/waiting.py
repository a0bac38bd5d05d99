"""Wait for other processes, with a deadline."""

import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_SECONDS = 60


def wait_until(is_true: Callable[[], object], what: str, seconds: float = _SECONDS) -> None:
    """Look again and again: what other processes do has no descriptor to wait for."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, what
        select.select([], [], [], 0.002)


def wait_for_end(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], _SECONDS)[0]
    finally:
        os.close(pidfd)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and not waited for."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def start_server(command: Sequence[str], scratch: Path, cwd: Path) -> "subprocess.Popen[bytes]":
    """Start a command and return when it has told, as to systemd, that it serves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(scratch / "notify"))
        notified.settimeout(_SECONDS)
        environment = dict(os.environ, NOTIFY_SOCKET=str(scratch / "notify"))
        server = subprocess.Popen(command, env=environment, cwd=cwd, stderr=subprocess.PIPE)
        assert notified.recv(100) == b"READY=1"
    return server
