"""Sockets that whoever started us passed: sd_listen_fds(3), ``exec:`` of varlinkctl."""

import fcntl
import os
import socket
import stat
from collections.abc import Sequence
from typing import NamedTuple

from cfs.errors import InvalidRequestError

__all__ = ["STORED_PREFIX", "Passed", "find_socket", "is_activated", "take_passed"]

STORED_PREFIX = "cfs-mount."  # names of what an earlier service put into the descriptor store
_FIRST_FD = 3
_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class Passed(NamedTuple):
    """A descriptor that was passed, and its name, if it has one."""

    name: str
    fd: int


def is_activated() -> bool:
    """Tell whether descriptors were passed to this process.

    Raises:
        InvalidRequestError: their number is none.
    """
    return _count() > 0


def take_passed() -> list[Passed]:
    """Return what was passed, close-on-exec, and remove the variables that tell of it.

    Raises:
        InvalidRequestError: the number of descriptors is none.
        OSError: a descriptor is not open.
    """
    count = _count()
    if not count:
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in _VARIABLES:
        os.environ.pop(variable, None)
    names += [""] * (count - len(names))
    passed = [Passed(names[index], _FIRST_FD + index) for index in range(count)]
    for _, fd in passed:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return passed


def find_socket(passed: Sequence[Passed]) -> socket.socket | None:
    """Return the socket to serve, the first one that is not from the descriptor store.

    Raises:
        InvalidRequestError: it is no stream socket of the UNIX family.
        OSError: as fstat(2).
    """
    fds = [fd for name, fd in passed if not name.startswith(STORED_PREFIX)]
    if not fds:
        return None
    fd = fds[0]
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        msg = f"descriptor {fd} is no socket"
        raise InvalidRequestError(msg)
    channel = socket.socket(fileno=fd)
    if (channel.family, channel.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        channel.detach()
        msg = f"descriptor {fd} is no UNIX stream socket"
        raise InvalidRequestError(msg)
    return channel


def _count() -> int:
    """Return the number of descriptors that are for this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    count = os.environ.get("LISTEN_FDS", "0")
    if not (count.isascii() and count.isdecimal()):
        msg = f"LISTEN_FDS is no number: {count!r}"
        raise InvalidRequestError(msg)
    return int(count)
