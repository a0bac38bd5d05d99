"""Serve in the foreground, as a command or a unit does."""

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cfs.fuse.mounts import GRACE_SECONDS, Mount
from cfs.linux.notify import Notifier

__all__ = ["serve_foreground"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def serve_foreground(
    mount: Mount,
    *,
    grace: float = GRACE_SECONDS,
    report: Callable[[Mount], None] = lambda _: None,
) -> int:
    """Serve until SIGINT, SIGTERM or an outside unmount; return the exit status.

    A service manager is told when it begins.  Main thread only, because of the signals.

    Args:
        mount: what :func:`cfs.fuse.start` gave.
        grace: as for :meth:`Mount.unmount`.
        report: called at each SIGUSR1.
    """
    ended = os.pidfd_open(mount.pid)
    try:
        with _signal_pipe() as signals:
            if notifier := Notifier.from_environment():
                notifier.send("READY=1")
            while True:
                readable, _, _ = select.select([signals.fileno(), ended], [], [])
                if ended in readable:
                    break
                numbers = set(signals.recv(len(_SIGNALS)))
                if numbers & {signal.SIGINT, signal.SIGTERM}:
                    mount.unmount(grace)
                    return 0
                if signal.SIGUSR1 in numbers:  # all that have handlers come here
                    report(mount)
    finally:
        os.close(ended)
    return 0 if mount.wait() == 0 else 1


@contextmanager
def _signal_pipe() -> Iterator[socket.socket]:
    """Make signals readable, one byte each, instead of deadly."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.settimeout(0)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        try:
            yield reader
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
