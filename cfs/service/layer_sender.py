"""Layers on their way to clients: a thread writes each into a pipe (spec b.7).

The pipe, the directory of objects and the writing end of another pipe go to the client.  By
that pipe's end the thread knows that all was read: until then it uses the store, so that no
collection removes the objects.
"""

import errno
import fcntl
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from itertools import chain, islice
from typing import TYPE_CHECKING

from cfs.errors import CfsError, escape
from cfs.linux.files import owned
from cfs.oci.layers import find_layer
from cfs.oci.splitdir import File, Inline, format_chunk
from cfs.oci.transfer import send_layer
from cfs.service.budget import Budget
from cfs.service.errors import MethodError, internal_error
from cfs.service.rights import trusted_uids

if TYPE_CHECKING:
    from io import RawIOBase

    from cfs.digest import Digest
    from cfs.repository.repository import Repository

__all__ = ["PATIENCE", "LayerSenders"]

PATIENCE = 600.0  # seconds in which a client neither reads nor writes
_MAX_PER_USER, _MAX = 64, 256  # a thread each
_BUFFER_SIZE = 1 << 16
_PIPE_SIZE = 1 << 18
_STOP_SECONDS = 10.0

_log = logging.getLogger(__name__)

OpenStore = Callable[[], AbstractContextManager["Repository"]]


class LayerSenders:
    """The layers that are being sent.  ``_lock`` guards the threads; any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._budget = Budget(per_uid=_MAX_PER_USER, total=_MAX, trusted=trusted_uids())
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def start(self, uid: int, open_store: OpenStore, diff_id: str) -> list[int]:
        """Begin to send a layer.

        Args:
            uid: of who receives it.
            open_store: opens the store; called in the thread that sends.
            diff_id: of the layer.

        Returns:
            For the receiver, and the caller's: stream, directory, sign of the stream's end.

        Raises:
            MethodError: ``NoSuchLayer``, or those of ``open_store``, or he has too many.
            CfsError: the layer cannot be read.
            OSError: likewise.
        """
        started: Future[list[int]] = Future()

        def send() -> None:
            try:
                _send(open_store, diff_id, self._stop_fd, started)
            finally:
                forget()

        def forget() -> None:
            self._budget.give_back(uid, 1)
            with self._lock:
                self._threads.remove(thread)

        thread = threading.Thread(target=send, name="layer-sender")
        if not self._budget.take(uid, 1):
            raise internal_error("too many layers are being sent already")
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            forget()
            raise
        return started.result()

    def close(self) -> None:
        """Break off what is being sent; wait for the threads, but not for dead file systems."""
        os.eventfd_write(self._stop_fd, 1)
        with self._lock:
            threads = list(self._threads)
        deadline_s = time.monotonic() + _STOP_SECONDS
        for thread in threads:
            thread.join(max(0, deadline_s - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):
            os.close(self._stop_fd)


def _send(open_store: OpenStore, diff_id: str, stop_fd: int, started: "Future[list[int]]") -> None:
    """Send a layer; an error goes to who has started it, or breaks the stream off later."""
    try:
        with open_store() as repository, ExitStack() as stack:
            layer = send_layer(repository, _find_layer(repository, diff_id))
            chunks = stack.enter_context(closing(layer))
            first = list(islice(chunks, 1))  # an error of opening it comes now
            theirs, sink, end = _make_ends(repository.objects.fd)
            owned(stack, end)
            with os.fdopen(sink, "wb", buffering=0) as stream:
                started.set_result(theirs)
                _transmit(chain(first, chunks), stream, stop_fd)
            _wait(end, 0, stop_fd)  # its end is always told
    except BrokenPipeError:
        pass  # he does not want the rest
    except (MethodError, CfsError, OSError) as error:
        if not started.done():
            started.set_exception(error)
        else:
            _log.warning("sending layer %s broke off: %s", diff_id, escape(str(error)))
    finally:
        if not started.done():
            started.set_exception(internal_error("the layer cannot be sent"))


def _find_layer(repository: "Repository", diff_id: str) -> "Digest":
    stream = find_layer(repository, diff_id)
    if stream is None:
        raise MethodError("NoSuchLayer", diff_id=diff_id)
    return stream


def _make_ends(objects_fd: int) -> tuple[list[int], int, int]:
    """Return the receiver's descriptors, our end of the stream, and where its end is told."""
    with ExitStack() as stack:
        stream, sink = os.pipe2(os.O_CLOEXEC)
        owned(stack, stream)
        owned(stack, sink)
        with suppress(OSError):  # there is a limit for all pipes of a user
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        os.set_blocking(sink, False)
        end, sign = os.pipe2(os.O_CLOEXEC)
        owned(stack, end)
        owned(stack, sign)
        # another open file than ours: its position and lock are the receiver's
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        directory = owned(stack, os.open(".", flags, dir_fd=objects_fd))
        stack.pop_all()
    return [stream, directory, sign], sink, end


def _transmit(chunks: Iterator[Inline | File], stream: "RawIOBase", stop_fd: int) -> None:
    data = bytearray()
    for chunk in chunks:
        data += format_chunk(chunk)
        if len(data) >= _BUFFER_SIZE:
            _write(stream, data, stop_fd)
            data.clear()
    _write(stream, data, stop_fd)


def _write(stream: "RawIOBase", data: bytearray, stop_fd: int) -> None:
    written = 0
    with memoryview(data) as view:
        while written < len(view):
            _wait(stream.fileno(), select.POLLOUT, stop_fd)
            with view[written:] as rest:
                written += stream.write(rest) or 0


def _wait(fd: int, events: int, stop_fd: int) -> None:
    """Wait for a descriptor.

    Raises:
        TimeoutError: it takes too long, or the service ends.
    """
    poll = select.poll()
    poll.register(fd, events)
    poll.register(stop_fd, select.POLLIN)
    ready = dict(poll.poll(PATIENCE * 1000))
    if not ready or stop_fd in ready:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
