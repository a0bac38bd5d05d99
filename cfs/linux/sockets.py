"""UNIX sockets: descriptors sent along (``SCM_RIGHTS`` of unix(7)), and who the peer is.

No shared state: any thread may call.
"""

import ctypes
import errno
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from cfs.linux.libc import libc

__all__ = [
    "peer_credentials",
    "peer_groups",
    "receive_fds",
    "receive_with_fds",
    "short_name",
]

_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)  # | of Python's own flags is slow
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python has no name for it
_CREDENTIALS = struct.Struct("=iII")  # struct ucred
_GROUP = struct.Struct("=I")
_USUAL_GROUPS = 64
_MAX_NAME_SIZE = 107  # sun_path of unix(7) and its NUL


def receive_fds(channel: socket.socket, size: int, max_fds: int) -> tuple[bytes, list[int]]:
    """Receive a message with descriptors, close-on-exec and owned by the caller.

    Args:
        channel: unix socket.
        size: bytes of the message at most.
        max_fds: descriptors at most.

    Raises:
        OSError: as recvmsg(2).
    """
    message, fds, _ = receive_with_fds(channel, size, max_fds)
    return message, fds


def receive_with_fds(
    channel: socket.socket, size: int, max_fds: int, flags: int = 0
) -> tuple[bytes, list[int], int]:
    """Receive as :func:`receive_fds`, with flags; return those received, ``MSG_CTRUNC``, too.

    ``socket.recv_fds`` drops its flags (Python 3.11), so it cannot ask for close-on-exec.

    Raises:
        OSError: as recvmsg(2).
    """
    fds = array("i")
    room = socket.CMSG_SPACE(max_fds * fds.itemsize)
    message, ancillary, seen, _ = channel.recvmsg(size, room, flags | _CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds), seen


def peer_credentials(channel: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group of the peer at the time of its connect(2).

    The process may have gone, and its number been given to another one: it proves nothing.

    Raises:
        OSError: as getsockopt(2).
    """
    raw = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def peer_groups(channel: socket.socket) -> tuple[int, ...]:
    """Return the supplementary groups of the peer at the time of its connect(2).

    Through the C library, because ``getsockopt`` of Python takes 256 groups at most.

    Raises:
        OSError: as getsockopt(2).
    """
    size = ctypes.c_uint32(_USUAL_GROUPS * _GROUP.size)
    while True:
        room = ctypes.create_string_buffer(size.value)
        if not libc().getsockopt(
            channel.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, room, ctypes.byref(size)
        ):
            return tuple(group for (group,) in _GROUP.iter_unpack(room.raw[: size.value]))
        if ctypes.get_errno() != errno.ERANGE:  # the kernel told the size it needs
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def short_name(path: str) -> Iterator[str]:
    """Yield a name for bind(2) and connect(2) that is the path, or valid in the block only.

    Longer paths than a socket's address holds are named through ``/proc``.

    Raises:
        OSError: the directory cannot be opened, or the name in it alone is too long.
    """
    if len(os.fsencode(path)) <= _MAX_NAME_SIZE:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{fd}/{name}"
        if len(os.fsencode(short)) > _MAX_NAME_SIZE:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        yield short
    finally:
        os.close(fd)
