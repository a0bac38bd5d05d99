"""What others see of a process while it lives: a locked descriptor, and a name that goes with it.

The descriptor's lock (of the open file, so all processes that hold a copy hold the lock) ends
with the last of them, however that ends; the name is removed by whoever ends in good order.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

__all__ = ["Trace", "remove_traces"]


class Trace(NamedTuple):
    """A descriptor to hold.

    Attributes:
        fd: file or directory with a lock.
        name: entry of the directory ``fd`` to remove at the end, or None.
    """

    fd: int
    name: str | None = None


def remove_traces(traces: Iterable[Trace]) -> None:
    """Remove the names; the descriptors stay open."""
    for trace in traces:
        if trace.name is not None:
            with suppress(OSError):  # gone already, or the file system does not let us any more
                os.unlink(trace.name, dir_fd=trace.fd)
