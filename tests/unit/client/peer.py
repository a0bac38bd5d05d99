"""A peer of clients that answers as it is told."""

import json
import os
import socket
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Answer = Callable[[socket.socket, dict[str, Any], list[int]], None]
TIMEOUT = 20


class Peer:
    """Accepts connections, one after the other, answers each call, and remembers them."""

    def __init__(self, path: Path, answer: Answer, nr_connections: int) -> None:
        self._nr_connections = nr_connections
        self.calls: list[dict[str, Any]] = []
        self.address = f"unix:{path}"
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(TIMEOUT)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self._listener:
            for _ in range(self._nr_connections):
                self._answer_all(self._listener.accept()[0])

    def _answer_all(self, channel: socket.socket) -> None:
        with channel:
            channel.settimeout(TIMEOUT)
            data = b""
            while True:
                room = socket.CMSG_SPACE(16)
                try:
                    piece, ancillary, _, _ = channel.recvmsg(1 << 16, room)
                except ConnectionResetError:
                    return
                if not piece:
                    return
                fds = array("i")
                for _, _, content in ancillary:
                    fds.frombytes(content)
                data += piece
                while b"\0" in data:
                    message, _, data = data.partition(b"\0")
                    self.calls.append(json.loads(message))
                    with suppress(BrokenPipeError):
                        self._answer(channel, self.calls[-1], list(fds))
                for fd in fds:
                    os.close(fd)


@contextmanager
def serving(path: Path, answer: Answer, nr_connections: int = 1) -> Iterator[Peer]:
    peer = Peer(path, answer, nr_connections)
    try:
        yield peer
    finally:
        peer.thread.join(TIMEOUT)
        assert not peer.thread.is_alive()


def replying(*messages: object) -> Answer:
    def answer(channel: socket.socket, _: dict[str, Any], __: list[int]) -> None:
        for message in messages:
            data = message if isinstance(message, bytes) else json.dumps(message).encode()
            channel.sendall(data + b"\0")

    return answer
