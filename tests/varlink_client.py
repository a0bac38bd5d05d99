"""A bare varlink client for tests (raw bytes, descriptors, deadlines), and a server to talk to."""

import json
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from cfs.linux.framing import EndOfMessages, MessageReader, close_all
from cfs.linux.sockets import short_name
from cfs.service.dispatch import Dispatcher
from cfs.service.listening import listening
from cfs.service.server import Server

SECONDS = 60
Json = dict[str, Any]


class Reply(NamedTuple):
    """A reply and its descriptors, which are the caller's."""

    members: Json
    fds: list[int]


class RawClient:
    """A connection; a context manager closes it."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._reader = MessageReader(channel, 1 << 30)

    @classmethod
    def connect(cls, path: str) -> "RawClient":
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_name(path) as name:
                channel.connect(name)
        except BaseException:
            channel.close()
            raise
        channel.settimeout(SECONDS)
        return cls(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self.channel.close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if fds:
            data = data[socket.send_fds(self.channel, [data], list(fds)) :]
        self.channel.sendall(data)

    def send(self, method: str, fds: Sequence[int] = (), **members: Any) -> None:
        self.send_raw(json.dumps({"method": method, **members}).encode() + b"\0", fds)

    def receive(self) -> Reply | None:
        """Return the next reply; None: the connection is closed."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        while True:
            assert poll.poll(SECONDS * 1000), "no reply"
            try:
                message = self._reader.read()
            except (EndOfMessages, ConnectionResetError):
                return None
            if message is not None:
                return Reply(json.loads(message.data), message.fds)

    def call(self, method: str, **parameters: Any) -> Json:
        """Return the reply of a call that has one, without descriptors."""
        self.send(method, parameters=parameters)
        reply = self.receive()
        assert reply is not None, "the connection was closed"
        close_all(reply.fds)
        return reply.members


@contextmanager
def serving(dispatcher: Dispatcher, path: Path) -> Iterator[Server]:
    """Serve in a thread on a socket file; no thread stays."""
    with listening(str(path)) as channel:
        server = Server(dispatcher, channel)
        thread = threading.Thread(target=server.serve, name="server")
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(SECONDS)
            assert not thread.is_alive()
