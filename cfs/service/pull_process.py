"""A pull in a process of its own, so that short calls of others and the pull do not wait in turn.

All threads of the service share one interpreter: within it, a pull made one of 100 short calls last
60 ms, and took 1.7 times as long itself (docs/performance.md).

The process gets the store's locked directory, and works with the rights of the thread that has
started it.  It ends when its socket does: nobody wants the image any more, or the service has gone.
"""

import os
import select
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from cfs.errors import CfsError, describe
from cfs.linux.credentials import Credentials, acting_as, is_acting
from cfs.linux.interpreter import command
from cfs.oci.pull import Event, Progress, Pulled, Report, Started
from cfs.oci.pull import pull as pull_here
from cfs.oci.sources import SourceOptions, Stopper
from cfs.repository.repository import Repository
from cfs.service.errors import internal_error
from cfs.service.rights import as_service, load_modules

if TYPE_CHECKING:
    from cfs.objectdir import Verity
    from cfs.repository.metadata import Metadata

__all__ = ["Pace", "main", "pull"]

_MAIN = "from cfs.service.pull_process import main\nmain(int(sys.argv[1]), int(sys.argv[2]))"
_OPTIONS = tuple(option.name for option in fields(SourceOptions) if option.name != "stopper")
_INTERVAL = 0.05  # seconds between reports of progress of a layer
_END_SECONDS = 10  # once nobody wants the image any more


class _Order(NamedTuple):
    """What the process is to do; the first object that it receives."""

    path: str
    metadata: "Metadata"
    verity: "Verity"
    credentials: Credentials | None
    image: str
    options: dict[str, Any]
    name: str | None
    bootable: bool


class _Failure(NamedTuple):
    """Why there is no image; the last object that the process sends, unless it is the image."""

    message: str


@dataclass
class Pace:
    """Which reports of progress come too soon after others; one thread at a time."""

    _sizes: dict[str, int] = field(default_factory=dict)
    _told: dict[str, float] = field(default_factory=dict)

    def is_too_soon(self, event: Event) -> bool:
        """Tell whether to leave an event out; never the last of a layer."""
        if isinstance(event, Started):
            self._sizes[event.id] = event.size
        if not isinstance(event, Progress):
            return False
        now = time.monotonic()
        is_last = event.size == self._sizes.get(event.id)
        if not is_last and now - self._told.get(event.id, 0.0) < _INTERVAL:
            return True
        self._told[event.id] = now
        return False


def pull(
    repository: Repository,
    image: str,
    options: SourceOptions,
    *,
    name: str | None,
    bootable: bool,
    report: Report,
) -> Pulled:
    """Pull as :func:`cfs.oci.pull.pull`, with few of the reports of progress.

    Raises:
        StoppedError: the stopper of the options has ended it; there is no tag.
        MethodError: ``InternalError``: anything else went wrong.
        OSError: the process cannot be started.
    """
    order = _Order(
        repository.path,
        repository.metadata,
        repository.objects.verity,
        Credentials.current() if is_acting() else None,
        image,
        {key: getattr(options, key) for key in _OPTIONS},
        name,
        bootable,
    )
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(ours)
        with theirs:
            process = _start(theirs, repository.fd)
        stack.callback(_end, ours, process)
        stack.enter_context(options.stopper.calling(lambda: ours.shutdown(socket.SHUT_RDWR)))
        outcome = _follow(ours, order, report)
    options.stopper.check()
    if isinstance(outcome, Pulled):
        return outcome
    raise internal_error(outcome.message)


def _start(channel: socket.socket, store_fd: int) -> "subprocess.Popen[bytes]":
    words = (str(channel.fileno()), str(store_fd))
    with as_service():  # a program has the process's rights, but would keep a thread's groups
        return subprocess.Popen(  # noqa: S603 - our own program
            command(_MAIN, *words),
            pass_fds=[channel.fileno(), store_fd],
            stdin=subprocess.DEVNULL,
            process_group=0,  # signals of a terminal are the business of the service
        )


def _follow(channel: socket.socket, order: _Order, report: Report) -> Pulled | _Failure:
    """Send the order, report events and return how it ended."""
    with Connection(os.dup(channel.fileno())) as connection:
        try:
            connection.send(order)
            while not isinstance(received := connection.recv(), Pulled | _Failure):
                report(received)
        except (EOFError, OSError):
            return _Failure("the pull ended before its time")
        return received


def _end(channel: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    """Have the process end, if it has not done so, and wait for that."""
    with suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(socket_fd: int, store_fd: int) -> None:
    """Be the process.

    Args:
        socket_fd: connection to who has started it.
        store_fd: the store's directory, with its lock.
    """
    with Connection(socket_fd) as connection, suppress(EOFError, OSError):  # it is wanted no more
        order: _Order = connection.recv()
        stopper = Stopper()
        thread = threading.Thread(target=_await_end, args=(socket_fd, stopper), daemon=True)
        thread.start()
        connection.send(_carry_out(order, store_fd, stopper, connection))
    # a thread may still wait for a program or a file system: nobody waits for it
    os._exit(0)


def _await_end(fd: int, stopper: Stopper) -> None:
    """Stop the pull when the socket ends."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    stopper.stop()


def _carry_out(
    order: _Order, store_fd: int, stopper: Stopper, connection: "Connection[Any, Any]"
) -> Pulled | _Failure:
    pace = Pace()

    def report(event: Event) -> None:
        if not pace.is_too_soon(event):
            connection.send(event)

    try:
        with ExitStack() as stack:
            if order.credentials is not None:
                load_modules()
                stack.enter_context(acting_as(order.credentials))
            repository = Repository.adopt(order.path, store_fd, order.metadata, order.verity)
            stack.enter_context(repository)
            options = SourceOptions(**order.options, stopper=stopper)
            return pull_here(
                repository, order.image, options,
                name=order.name, bootable=order.bootable, report=report,
            )  # fmt: skip
    except (CfsError, OSError) as error:
        return _Failure(describe(error))
