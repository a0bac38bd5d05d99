"""Serving connections: one thread each, until told to stop."""

import errno
import logging
import os
import resource
import select
import socket
import threading
import time
from contextlib import closing, suppress

from cfs.linux.libc import libc
from cfs.service.budget import Budget
from cfs.service.call import Call, close_fds
from cfs.service.connection import Budgets, Connection
from cfs.service.dispatch import Dispatcher
from cfs.service.errors import ProtocolError
from cfs.service.request import decode_request
from cfs.service.watcher import Watcher

__all__ = ["Server"]

_CONNECTIONS_PER_UID, _CONNECTIONS = 512, 1024
_MEMORY_PER_UID, _MEMORY = 1 << 30, 2 << 30  # bytes; a long message may decode to 900 MiB
_FDS_PER_UID, _FDS = 2048, 4096
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
        trusted = frozenset({0, os.geteuid()})
        self._budgets = Budgets(
            Budget(per_uid=_CONNECTIONS_PER_UID, total=_CONNECTIONS, trusted=trusted),
            Budget(per_uid=_MEMORY_PER_UID, total=_MEMORY, trusted=trusted),
            Budget(per_uid=_FDS_PER_UID, total=_FDS, trusted=trusted),
        )
        self._watcher = Watcher()
        self._lock = threading.Lock()
        self._threads: dict[Connection, threading.Thread] = {}
        self._is_stopping = False
        self._listens = bool(channel.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._wakeup, self._waker = socket.socketpair()

    def serve(self) -> None:
        """Serve until :meth:`stop`, or until the peer of a connected socket has gone.

        Calls that are still under way then lose their clients, and get a few seconds to end.
        """
        _raise_fd_limit()
        _free_at_once()
        self._watcher.start()
        try:
            if self._listens:
                self._accept_all()
            else:
                self._serve_one()
        finally:
            if self._listens:  # a connected one is its connection's, which may still use it
                self._channel.close()
            self._end_connections()
            self._watcher.close()
            self._wakeup.close()
            self._waker.close()

    def stop(self) -> None:
        """Have :meth:`serve` return soon.  For any thread, and for signal handlers."""
        self._is_stopping = True
        with suppress(OSError):  # serve() has returned, or was told often
            self._waker.send(b"x", socket.MSG_DONTWAIT)

    def _accept_all(self) -> None:
        self._channel.settimeout(0)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while not self._is_stopping:
            poll.poll()
            try:
                channel, _ = self._channel.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in _LACKS:
                    raise
                _log.warning("cannot accept a connection: %s", error.strerror)
                time.sleep(_RETRY_SECONDS)
                continue
            self._begin(channel)

    def _serve_one(self) -> None:
        """Serve the connected socket in a thread, so that a signal can end it in this one."""
        if self._begin(self._channel):
            self._wakeup.recv(1)

    def _begin(self, channel: socket.socket) -> bool:
        """Serve a connection in a thread of its own; close it if there are too many."""
        try:
            connection = Connection(channel, self._budgets, self._watcher)
        except OSError as error:
            _log.info("a connection ended at once: %s", error.strerror)
            channel.close()
            return False
        uid = connection.peer.uid
        if not self._budgets.connections.take(uid, 1):
            _log.warning("user %d has too many connections", uid)
            connection.close()
            return False
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="connection", daemon=True
        )
        with self._lock:
            self._threads[connection] = thread
        try:
            thread.start()
        except RuntimeError as error:  # no thread is left
            _log.warning("cannot serve a connection: %s", error)
            self._end(connection)
        return True

    def _serve(self, connection: Connection) -> None:
        try:
            while self._answer_next(connection):
                pass
        except ProtocolError as error:
            _log.info("closing a connection of user %d: %s", connection.peer.uid, error)
        except OSError as error:
            _log.debug("a connection ended: %s", error.strerror)
        except Exception:  # noqa: BLE001 - the service goes on
            _log.exception("closing a connection")
        finally:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        connection.close()
        self._budgets.connections.give_back(connection.peer.uid, 1)
        with self._lock:
            del self._threads[connection]
        if not self._listens:
            self.stop()

    def _answer_next(self, connection: Connection) -> bool:
        """Answer one request; return False if no more come."""
        received = connection.receive()
        if received is None:
            return False
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
            with closing(self._dispatcher.answer(call, request)) as replies:
                for reply in replies:
                    self._send(connection, call, reply)
        finally:
            call.close()
        return True

    def _send(self, connection: Connection, call: Call, reply: bytes) -> None:
        fds = call.take_reply_fds()
        try:
            if not call.oneway:
                connection.send(reply, fds)
        finally:
            close_fds(fds)

    def _end_connections(self) -> None:
        with self._lock:
            threads = dict(self._threads)
        for connection in threads:
            connection.shut_down()
        self._dispatcher.stop()
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in threads.values():
            thread.join(max(0, deadline - time.monotonic()))


def _free_at_once() -> None:
    """Have glibc give long messages back to the system, rather than learn to keep their memory."""
    if mallopt := getattr(libc(), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_SIZE)


def _raise_fd_limit() -> None:
    """Allow as many descriptors as the hard limit: clients send up to 253 with a message."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
