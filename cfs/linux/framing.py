"""Messages that end with NUL on a stream socket, each with its descriptors (varlink).

The kernel ties descriptors to the bytes of one ``sendmsg``.  A read stops behind bytes that came
with descriptors, but not before them (spec cli-and-varlink d.3): so the reader looks for the end of
a message first and takes exactly that much, and what comes along belongs to this message.

Nothing here waits.  One thread at a time.
"""

import os
import socket
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cfs.errors import FormatError
from cfs.linux.sockets import receive_with_fds

__all__ = ["MAX_FDS", "EndOfMessages", "Message", "MessageReader", "MessageWriter", "close_all"]

MAX_FDS = 253  # SCM_MAX_FD of the kernel
_PIECE_SIZE = 1 << 16
# plain numbers: each | or & of the flags of Python takes as long as a system call
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_RECEIVE = int(socket.MSG_DONTWAIT)
_LOST = int(socket.MSG_CTRUNC)
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Message(NamedTuple):
    """A message without its NUL, and its descriptors, which are close-on-exec and the caller's."""

    data: bytes
    fds: list[int]


class EndOfMessages(EOFError):  # noqa: N818 - it is no error unless within a message
    """The peer sends no more.

    Attributes:
        is_within: the last message is not complete.
    """

    def __init__(self, *, is_within: bool) -> None:
        super().__init__("the peer has closed the connection")
        self.is_within = is_within


def close_all(fds: list[int]) -> None:
    """Close descriptors and empty their list."""
    while fds:
        os.close(fds.pop())


class MessageReader:
    """Takes messages from a socket.

    Args:
        channel: unix stream socket; borrowed.
        max_size: bytes of a message at most, its NUL included.
        reserve: called before bytes of a message are taken, with the number that are held then.
    """

    def __init__(
        self,
        channel: socket.socket,
        max_size: int,
        reserve: Callable[[int], None] = lambda _size: None,
    ) -> None:
        self._channel = channel
        self._max_size = max_size
        self._reserve = reserve
        self._data = bytearray()
        self._fds: list[int] = []

    @property
    def size(self) -> int:
        """Bytes held of a message that is not complete."""
        return len(self._data)

    @property
    def nr_fds(self) -> int:
        """Descriptors held of a message that is not complete."""
        return len(self._fds)

    def read(self) -> Message | None:
        """Return the next message; None: its rest is not there yet.

        Raises:
            FormatError: it is too long, or has too many descriptors.
            EndOfMessages: the peer sends no more.
            OSError: as recvmsg(2).
        """
        try:
            while not (seen := self._peek()).endswith(b"\0"):
                self._take(len(seen))
            self._take(len(seen))
        except BlockingIOError:
            return None
        message = Message(bytes(memoryview(self._data)[:-1]), self._fds)
        self._data = bytearray()
        self._fds = []
        return message

    def close(self) -> None:
        """Close the descriptors of a message that was never completed; the socket stays open."""
        close_all(self._fds)

    def _peek(self) -> bytes:
        """Return what is there, up to the end of the message."""
        seen = self._channel.recv(_PIECE_SIZE, _PEEK)
        if not seen:
            raise EndOfMessages(is_within=bool(self._data))
        end = seen.find(b"\0") + 1
        if end:
            seen = seen[:end]
        if len(self._data) + len(seen) > self._max_size:
            msg = f"message of more than {self._max_size} bytes"
            raise FormatError(msg)
        return seen

    def _take(self, size: int) -> None:
        """Take what was peeked, and the descriptors that came with it."""
        self._reserve(len(self._data) + size)
        while size:
            data, fds, flags = receive_with_fds(self._channel, size, MAX_FDS, _RECEIVE)
            self._fds += fds
            if flags & _LOST or len(self._fds) > MAX_FDS:
                msg = f"message with more than {MAX_FDS} descriptors, or than this process may have"
                raise FormatError(msg)
            self._data += data
            size -= len(data)


class MessageWriter:
    """Sends messages over a socket, one after the other.

    Args:
        channel: unix stream socket; borrowed.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._rest = memoryview(b"")
        self._fds: Sequence[int] = ()

    def start(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Begin a message; the one before it has been sent.

        Args:
            data: without NUL.
            fds: borrowed until :meth:`send` has returned.

        Raises:
            FormatError: too many descriptors.
        """
        assert not self._rest
        if len(fds) > MAX_FDS:
            msg = f"{len(fds)} descriptors: a message takes {MAX_FDS}"
            raise FormatError(msg)
        self._rest = memoryview(data + b"\0")
        self._fds = fds

    def send(self) -> bool:
        """Send what the socket takes; return whether that was all.

        Descriptors go with the first byte.

        Raises:
            OSError: as sendmsg(2).
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", self._fds))]
        try:
            while self._rest:
                sent = self._channel.sendmsg([self._rest], rights if self._fds else [], _SEND)
                self._rest = self._rest[sent:]
                self._fds = ()
        except BlockingIOError:
            return False
        self._rest = memoryview(b"")  # what is left of a slice keeps all of the message
        return True
