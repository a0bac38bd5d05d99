"""The asynchronous client, for asyncio."""

import asyncio
import select
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self, TypeVar

from cfs.client.address import default_addresses, new_socket, socket_name, unreachable
from cfs.client.blocking import GIVE_BACK_SECONDS
from cfs.client.connection import Connection, Steps
from cfs.client.errors import ConnectionLostError
from cfs.client.methods import Method, Result
from cfs.client.repository import CloseRepository, Opened, OpenRepository
from cfs.errors import CfsError

__all__ = ["AsyncClient"]

_R = TypeVar("_R", bound=Result)
_T = TypeVar("_T")
_FULL_BACKLOG_DELAY = 0.01  # seconds


class AsyncClient:
    """A connection to a service; an asynchronous context manager that opens and closes it.

    Belongs to one event loop.  Its calls follow each other; tasks that want to call at the same
    time wait for their turn, or have a client each.  A call that is cancelled, and every other
    error but a :class:`~cfs.client.errors.VarlinkError`, closes the connection.

    Args:
        address: as for :class:`~cfs.client.blocking.Client`.
        timeout: likewise.
    """

    def __init__(self, address: str | None = None, *, timeout: float | None = None) -> None:
        """Connect to nothing yet."""
        self._address = address
        self._timeout = timeout
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Event | None = None  # of the one call under way

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def connect(self) -> None:
        """Connect.

        Raises:
            ConnectionLostError: nobody answers there.
            InvalidRequestError: it is no address.
        """
        self.close()
        addresses = default_addresses() if self._address is None else [self._address]
        lost: list[ConnectionLostError] = []
        for address in addresses:
            try:
                self._connection = Connection(await _connect_to(address, self._timeout))
            except ConnectionLostError as error:
                lost.append(error)
            else:
                return
        raise ConnectionLostError("; ".join(map(str, lost)))

    def close(self) -> None:
        """Close the connection: ends what lasts as long as it, such as waiting for a mount.

        A call under way in another task raises :class:`ConnectionLostError`.
        """
        if self._connection is None:
            return
        if self._waiting is not None:  # the event loop does not notice that the descriptor goes
            self._stop_watching(self._connection.fd)
            self._waiting.set()
        self._connection.close()

    @property
    def peer_uid(self) -> int:
        """User who the service ran as when it began to listen."""
        return self._connected().peer_uid

    async def call(self, method: Method[_R]) -> _R:
        """Call a method and return its reply; errors as for the synchronous client."""
        async with self._turn:
            reply = await self._run(self._connected().call(method))
        assert reply is not None
        return reply

    async def send(self, method: Method[_R]) -> None:
        """Call a method without a reply: nothing tells whether it worked; else as :meth:`call`."""
        async with self._turn:
            await self._run(self._connected().call(method, oneway=True))

    async def stream(self, method: Method[_R]) -> AsyncGenerator[_R, None]:
        """Call a method and yield its replies; errors as for a call.

        Other calls are refused until the stream ends.  To leave it before closes the connection:
        use ``contextlib.aclosing`` so that this happens at once.
        """
        connection = self._connected()
        async with self._turn:
            await self._run(connection.start_stream(method))
        is_last = False
        try:
            while not is_last:
                await asyncio.sleep(0)  # other tasks get their turn, however fast replies come
                is_last = True  # after an error as well
                reply, continues = await self._run(connection.next_reply(method))
                is_last = not continues
                yield reply
        finally:
            if not is_last:
                self.close()

    @asynccontextmanager
    async def opened(
        self, path: str | None = None, *, user: bool | None = None, system: bool | None = None
    ) -> AsyncIterator[Opened]:
        """Open a store while the block runs; as for the synchronous client."""
        opened = await self.call(OpenRepository(path, user, system))
        try:
            yield opened
        finally:
            with suppress(CfsError):  # closed already, or the service has gone
                await self._give_back(CloseRepository(opened.handle))

    async def _give_back(self, call: CloseRepository) -> None:
        connection = self._connected()
        if connection.is_free:
            await self.call(call)
        elif not connection.is_lost:
            async with AsyncClient(self._address, timeout=GIVE_BACK_SECONDS) as other:
                await other.send(call)

    def _connected(self) -> Connection:
        if self._connection is None:
            msg = "not connected to a service"
            raise ConnectionLostError(msg)
        return self._connection

    async def _run(self, steps: Steps[_T]) -> _T:
        try:
            while True:
                try:
                    event = next(steps)
                except StopIteration as stop:
                    result: _T = stop.value
                    return result
                await self._wait(event)
        finally:
            steps.close()  # cancelled: that ends the connection

    async def _wait(self, event: int) -> None:
        loop = asyncio.get_running_loop()
        connection = self._connected()
        self._waiting = ready = asyncio.Event()
        watch = loop.add_reader if event == select.POLLIN else loop.add_writer
        watch(connection.fd, ready.set)
        try:
            async with asyncio.timeout(self._timeout):
                await ready.wait()
        except TimeoutError:
            msg = f"the service was silent for {self._timeout} seconds"
            raise ConnectionLostError(msg) from None
        finally:
            self._waiting = None
            self._stop_watching(connection.fd)
        if connection.fd < 0:
            msg = "the connection to the service was closed"
            raise ConnectionLostError(msg)

    @staticmethod
    def _stop_watching(fd: int) -> None:
        if fd >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(fd)
            loop.remove_writer(fd)


async def _connect_to(address: str, timeout: float | None) -> socket.socket:
    channel = new_socket()
    try:
        channel.settimeout(0)
        with socket_name(address) as name:
            async with asyncio.timeout(timeout):
                while not _try_connect(channel, name):
                    await asyncio.sleep(_FULL_BACKLOG_DELAY)
    except OSError as error:  # TimeoutError as well
        channel.close()
        raise unreachable(address, error) from None
    except BaseException:
        channel.close()
        raise
    return channel


def _try_connect(channel: socket.socket, name: str | bytes) -> bool:
    """Connect; False: too many others want to, and a unix socket does not tell when they do not."""
    try:
        channel.connect(name)
    except BlockingIOError:
        return False
    return True
