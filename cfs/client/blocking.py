"""The synchronous client."""

import select
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Self, TypeVar

from cfs.client.address import default_addresses, new_socket, socket_name, unreachable
from cfs.client.connection import Connection, Steps
from cfs.client.errors import ConnectionLostError
from cfs.client.methods import Method, Result
from cfs.client.repository import CloseRepository, Opened, OpenRepository
from cfs.errors import CfsError

__all__ = ["GIVE_BACK_SECONDS", "Client"]

GIVE_BACK_SECONDS = 5.0

_R = TypeVar("_R", bound=Result)
_T = TypeVar("_T")


class Client:
    """A connection to a service; a context manager that closes it.

    One thread at a time.  After a :class:`~cfs.client.errors.VarlinkError` it can be used on, after
    every other error of a call it is closed.

    Args:
        address: as for :func:`~cfs.client.address.socket_name`; None: where the units of systemd
            listen, the user's or the system's; or a connected socket, owned from now on.
        timeout: seconds that the service may be silent during a call, or None for ever.

    Raises:
        ConnectionLostError: nobody answers there.
        InvalidRequestError: it is no address.
    """

    def __init__(
        self, address: str | socket.socket | None = None, *, timeout: float | None = None
    ) -> None:
        self._address = address
        self._timeout = timeout
        if not isinstance(address, socket.socket):
            address = _connect(address, timeout)
        self._connection = Connection(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: ends what lasts as long as it, such as waiting for a mount."""
        self._connection.close()

    @property
    def peer_uid(self) -> int:
        """User who the service ran as when it began to listen."""
        return self._connection.peer_uid

    def call(self, method: Method[_R]) -> _R:
        """Call a method and return its reply.

        Raises:
            VarlinkError: the service replied with an error.
            InvalidReplyError: the reply is none to this call.
            ConnectionLostError: the connection ended before it, or time is up.
            InvalidRequestError: a stream is under way.
        """
        reply = self._run(self._connection.call(method))
        assert reply is not None
        return reply

    def send(self, method: Method[_R]) -> None:
        """Call a method without a reply: nothing tells whether it worked; else as :meth:`call`."""
        self._run(self._connection.call(method, oneway=True))

    def stream(self, method: Method[_R]) -> Generator[_R, None, None]:
        """Call a method when first asked for a reply, and yield its replies; errors as for a call.

        To leave a stream before its end closes the connection, there is no other way to cancel it.
        """
        self._run(self._connection.start_stream(method))
        is_last = False
        try:
            while not is_last:
                is_last = True  # after an error as well
                reply, continues = self._run(self._connection.next_reply(method))
                is_last = not continues
                yield reply
        finally:
            if not is_last:
                self.close()

    @contextmanager
    def opened(
        self, path: str | None = None, *, user: bool | None = None, system: bool | None = None
    ) -> Iterator[Opened]:
        """Open a store while the block runs; arguments as for :class:`OpenRepository`.

        If a call in the block closes the connection, the store is closed by another one.

        Raises:
            RepoNotFoundError: there is none that can be opened.
            CfsError: as for :meth:`call`.
        """
        opened = self.call(OpenRepository(path, user, system))
        try:
            yield opened
        finally:
            with suppress(CfsError):  # closed already, or the service has gone
                self._give_back(CloseRepository(opened.handle))

    def _give_back(self, call: CloseRepository) -> None:
        """Close a store, which outlives its connection: on this one, or on a new one."""
        if self._connection.is_free:
            self.call(call)
        elif not (self._connection.is_lost or isinstance(self._address, socket.socket)):
            with Client(self._address, timeout=GIVE_BACK_SECONDS) as other:
                other.send(call)

    def _run(self, steps: Steps[_T]) -> _T:
        try:
            while True:
                try:
                    event = next(steps)
                except StopIteration as stop:
                    result: _T = stop.value
                    return result
                self._wait(event)
        finally:
            steps.close()  # interrupted: that ends the connection

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._connection.fd, event)
        if not poll.poll(None if self._timeout is None else self._timeout * 1000):
            msg = f"the service was silent for {self._timeout} seconds"
            raise ConnectionLostError(msg)


def _connect(address: str | None, timeout: float | None) -> socket.socket:
    if address is not None:
        return _connect_to(address, timeout)
    lost: list[ConnectionLostError] = []
    for each in default_addresses():
        try:
            return _connect_to(each, timeout)
        except ConnectionLostError as error:
            lost.append(error)
    raise ConnectionLostError("; ".join(map(str, lost)))


def _connect_to(address: str, timeout: float | None) -> socket.socket:
    channel = new_socket()
    try:
        with socket_name(address) as name:
            channel.settimeout(timeout)
            channel.connect(name)
        channel.settimeout(None)
    except OSError as error:
        channel.close()
        raise unreachable(address, error) from None
    except BaseException:
        channel.close()
        raise
    return channel
