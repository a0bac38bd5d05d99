"""A thread that notices peers that go while their calls run (``POLLHUP``)."""

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Watcher", "has_hung_up"]


def has_hung_up(fd: int) -> bool:
    """Tell whether the peer of a socket has closed it; a half close does not count."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


class Watcher:
    """Watches connected sockets, each until it hangs up once.  Any thread may call."""

    def __init__(self) -> None:
        """Prepare; nothing is noticed before :meth:`start`."""
        self._lock = threading.Lock()
        self._watched: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Start the thread: not when the first call asks, whose thread may act as somebody else."""
        self._thread.start()

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once the peer of ``fd`` has closed its socket."""
        with self._lock:
            if fd in self._watched:
                return
            self._watched[fd] = callback
            self._epoll.register(fd, select.EPOLLHUP | select.EPOLLONESHOT)

    def forget(self, fd: int) -> None:
        """Watch a socket no longer; to be called before it is closed."""
        with self._lock:
            if self._watched.pop(fd, None) is not None:
                with suppress(OSError):
                    self._epoll.unregister(fd)

    def close(self) -> None:
        """End the thread, if it was started."""
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wakeup)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wakeup:
                    return
                with self._lock:  # by now the number may be that of another socket
                    callback = self._watched.get(fd)
                    has_gone = callback is not None and has_hung_up(fd)
                if callback is not None and has_gone:
                    callback()
