"""Wait for other processes, with a deadline."""

import os
import select
import time
from collections.abc import Callable

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
