"""Descriptors sent over sockets: ``SCM_RIGHTS`` of unix(7).  No shared state."""

import socket
from array import array

__all__ = ["receive_fds"]


def receive_fds(channel: socket.socket, size: int, max_fds: int) -> tuple[bytes, list[int]]:
    """Receive a message with descriptors, close-on-exec and owned by the caller.

    ``socket.recv_fds`` drops its flags (Python 3.11), so it cannot ask for close-on-exec.

    Args:
        channel: unix socket.
        size: bytes of the message at most.
        max_fds: descriptors at most.

    Raises:
        OSError: as recvmsg(2).
    """
    fds = array("i")
    room = socket.CMSG_SPACE(max_fds * fds.itemsize)
    message, ancillary, _, _ = channel.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)
