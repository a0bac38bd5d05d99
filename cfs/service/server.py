"""Serving connections until told to stop: short calls in turn, others beside them."""

import errno
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from cfs.linux.libc import libc
from cfs.service.budget import Budget
from cfs.service.call import Call, close_fds
from cfs.service.connection import Budgets, Connection
from cfs.service.dispatch import SHORT_METHODS, Dispatcher
from cfs.service.errors import ProtocolError
from cfs.service.leadership import Leadership
from cfs.service.request import Request, decode_request
from cfs.service.rights import trusted_uids
from cfs.service.watcher import Watcher

__all__ = ["Server"]

_CONNECTIONS_PER_UID, _CONNECTIONS = 512, 1024
_MEMORY_PER_UID, _MEMORY = 1 << 30, 2 << 30  # bytes; a long message may decode to 900 MiB
_FDS_PER_UID, _FDS = 2048, 4096
_ACCEPTED = 16  # connections, before calls get their turn
_SLOW_SECONDS = 0.03  # for a call: the next one of its connection does not hold up others
_RETRY_SECONDS = 0.1  # after an accept(2) that failed for lack of something
_STOP_SECONDS = 10  # for calls under way, once their clients were cut off
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_M_MMAP_THRESHOLD = -3  # malloc.h
_OWN_MAPPING_SIZE = 1 << 17  # bytes; what is larger is mapped by itself
_log = logging.getLogger(__name__)


class Server:
    """Serves a listening UNIX socket, or a connected one until its peer closes it."""

    def __init__(self, dispatcher: Dispatcher, channel: socket.socket) -> None:
        """Take over a socket; whether it listens is up to the socket."""
        self._dispatcher = dispatcher
        self._channel = channel
        trusted = trusted_uids()
        self._budgets = Budgets(
            Budget(per_uid=_CONNECTIONS_PER_UID, total=_CONNECTIONS, trusted=trusted),
            Budget(per_uid=_MEMORY_PER_UID, total=_MEMORY, trusted=trusted),
            Budget(per_uid=_FDS_PER_UID, total=_FDS, trusted=trusted),
        )
        self._watcher = Watcher()
        self._trusted = trusted
        self._leadership: Leadership[Connection | socket.socket] = Leadership(
            self._serve, self._end
        )
        self._connections: set[Connection] = set()
        self._failure: OSError | None = None
        self._is_stopping = False
        self._listens = bool(channel.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._wakeup, self._waker = socket.socketpair()
        self._waker.settimeout(0)

    def serve(self) -> None:
        """Serve until :meth:`stop`, or until the peer of a connected socket has gone.

        Calls that are still under way then lose their clients, and get a few seconds to end.  The
        calling thread only waits: it is the one that handles signals.

        Raises:
            OSError: as accept(2), or no thread can be started.
        """
        _raise_fd_limit()
        _free_at_once()
        try:
            if self._listens:
                self._channel.settimeout(0)
                self._leadership.add(self._channel)
            else:
                self._begin(self._channel)
            with _signals_waking(self._waker):
                self._watcher.start()
                self._leadership.start()
                while not self._is_stopping:
                    self._wakeup.recv(1)
        except RuntimeError as error:  # the watcher's thread, or the first leader
            raise OSError(errno.EAGAIN, str(error)) from None
        finally:
            self._end_connections()
            self._watcher.close()
            self._wakeup.close()
            self._waker.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Have :meth:`serve` return soon.  For any thread, and for signal handlers."""
        self._is_stopping = True
        with suppress(OSError):  # serve() has returned, or was told often
            self._waker.send(b"x")

    def _serve(self, ready: Connection | socket.socket) -> bool:
        """Accept connections, or answer one request; return whether more may come."""
        if not isinstance(ready, Connection):
            return self._accept()
        try:
            return self._answer_next(ready)
        except ProtocolError as error:
            _log.info("closing a connection of user %d: %s", ready.peer.uid, error)
        except OSError as error:
            _log.debug("a connection ended: %s", error.strerror)
        except Exception:  # noqa: BLE001 - the service goes on
            _log.exception("closing a connection")
        return False

    def _accept(self) -> bool:
        try:
            for _ in range(_ACCEPTED):
                self._begin(self._channel.accept()[0])
        except (BlockingIOError, ConnectionAbortedError):
            pass
        except OSError as error:
            if error.errno not in _LACKS:
                self._failure = error
                self.stop()
                return False
            _log.warning("cannot accept a connection: %s", error.strerror)
            self._leadership.hand_over()
            time.sleep(_RETRY_SECONDS)
        return True

    def _begin(self, channel: socket.socket) -> None:
        """Serve a connection; close it if there are too many."""
        try:
            connection = Connection(
                channel, self._budgets, self._watcher, self._leadership.hand_over
            )
        except OSError as error:
            _log.info("a connection ended at once: %s", error.strerror)
            channel.close()
            return
        uid = connection.peer.uid
        if not self._budgets.connections.take(uid, 1):
            _log.warning("user %d has too many connections", uid)
            connection.close()
            return
        self._connections.add(connection)
        self._leadership.add(connection)

    def _end(self, ended: Connection | socket.socket) -> None:
        ended.close()
        if isinstance(ended, Connection):
            self._budgets.connections.give_back(ended.peer.uid, 1)
            self._connections.remove(ended)
            if not self._listens:
                self.stop()

    def _answer_next(self, connection: Connection) -> bool:
        """Answer one request; return False if no more come."""
        received = connection.receive()
        if received is None:
            return False
        start = time.monotonic()
        fds = received.fds
        try:
            request = decode_request(received.data)
        except BaseException:
            close_fds(fds)
            raise
        del received  # it may be large
        call = Call(
            connection.fileno(),
            connection.peer,
            connection.disconnection,
            more=request.more,
            oneway=request.oneway,
            fds=fds,
        )
        try:
            if self._may_last(connection, request):
                self._leadership.hand_over()
            with closing(self._dispatcher.answer(call, request)) as replies:
                for reply in replies:
                    self._send(connection, call, reply)
        finally:
            call.close()
        connection.is_slow = time.monotonic() - start > _SLOW_SECONDS
        return True

    def _may_last(self, connection: Connection, request: Request) -> bool:
        """Tell whether a call may last: also what a foreign user's file systems have to do with."""
        return (
            request.method not in SHORT_METHODS
            or connection.peer.uid not in self._trusted
            or connection.is_slow
        )

    def _send(self, connection: Connection, call: Call, reply: bytes) -> None:
        fds = call.take_reply_fds()
        try:
            if not call.oneway:
                connection.send(reply, fds)
        finally:
            close_fds(fds)

    def _end_connections(self) -> None:
        self._leadership.stop()
        for connection in self._connections.copy():
            connection.shut_down()
        self._dispatcher.stop()
        self._leadership.join(_STOP_SECONDS)


@contextmanager
def _signals_waking(waker: socket.socket) -> Iterator[None]:
    """Have signals send a byte: the main thread handles them, any may be the one they interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def _free_at_once() -> None:
    """Have glibc give long messages back to the system, rather than learn to keep their memory."""
    if mallopt := getattr(libc(), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_SIZE)


def _raise_fd_limit() -> None:
    """Allow as many descriptors as the hard limit: clients send up to 253 with a message."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
