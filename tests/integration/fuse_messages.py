"""FUSE requests and replies as bytes, for whoever plays the kernel over a socket.

Layouts: spec fuse-data-plane 2.  Standard library only.
"""

import itertools
import select
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from cfs.fuse.dataplane import Opcode

__all__ = ["Dirent", "Kernel", "Opcode", "Reply", "getxattr_in", "parse_listing", "read_in"]

DEADLINE_MS = 30_000
REPLY_SIZE = (1 << 20) + 4096
IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ENTRY = struct.Struct("<QQQQII")
ATTR_OUT = struct.Struct("<QII")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
DIRENT = struct.Struct("<QQII")
INIT = struct.Struct("<IIIII11I")
MINOR = 38
FLAGS = 0x7FFFFFFF  # with fewer, pyfuse3 calls the kernel too old


class Reply(NamedTuple):
    """Errno (positive, or 0) and what follows the header."""

    error: int
    data: bytes


class Dirent(NamedTuple):
    """One entry of a listing; ``entry`` is ``fuse_entry_out`` of READDIRPLUS."""

    ino: int
    off: int
    kind: int
    name: bytes
    entry: bytes


class Kernel:
    """The kernel's end of the connection to one plane."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._uniques = itertools.count(2, 2)
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)

    def start(self) -> Reply:
        """Negotiate as every plane accepts it."""
        init = INIT.pack(7, MINOR, 131072, FLAGS, *[0] * 12)
        return self.call(Opcode.INIT, 0, init)

    def call(self, opcode: int, node: int, argument: bytes = b"", *, uid: int = 0) -> Reply:
        """Send a request, return its reply; notifications are passed over."""
        unique = next(self._uniques)
        size = IN_HEADER.size + len(argument)
        header = IN_HEADER.pack(size, opcode, unique, node, uid, uid, 1, 0, 0)
        self._channel.send(header + argument)
        while True:
            if not self._poll.poll(DEADLINE_MS):
                msg = f"no reply to opcode {opcode} of node {node}"
                raise TimeoutError(msg)
            message = self._channel.recv(REPLY_SIZE)
            size, error, answered = OUT_HEADER.unpack_from(message)
            assert size == len(message)
            if answered:
                assert answered == unique
                return Reply(-error, message[OUT_HEADER.size :])


def read_in(off: int, size: int, fh: int = 0) -> bytes:
    """Argument of READ, READDIR and READDIRPLUS."""
    return struct.pack("<QQIIQII", fh, off, size, 0, 0, 0, 0)


def getxattr_in(size: int, name: bytes | None = None) -> bytes:
    """Argument of GETXATTR, or without a name of LISTXATTR."""
    return struct.pack("<II", size, 0) + (b"" if name is None else name + b"\0")


def parse_listing(data: bytes, *, is_plus: bool) -> Iterator[Dirent]:
    """Yield the entries of a reply, all of which must be whole."""
    place = 0
    while place < len(data):
        entry = data[place : place + 128] if is_plus else b""
        place += len(entry)
        ino, off, size, kind = DIRENT.unpack_from(data, place)
        place += DIRENT.size
        name = data[place : place + size]
        assert len(name) == size
        place += -(-size // 8) * 8
        yield Dirent(ino, off, kind, name, entry)
    assert place == len(data)
