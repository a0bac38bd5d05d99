"""The lock of a store: ``flock`` on its top directory (spec repository 2.8).

Whoever uses a store holds the lock shared, collection holds it exclusive.  A process opens a
store's directory once, however often it is asked to: two opens would be two lock owners, and
collection through one would wait for the other for ever.

``flock`` knows no order: where imports follow each other without a gap, collection would never
come.  So there is a turnstile, ``flock`` on ``meta.json``: whoever opens the store goes through
(shared, until it has the store's lock), and collection closes it while it waits.  It is open
again half of that time, as who holds the store may be waiting for a command that has yet to open
it (``transaction``).  composefs-rs knows nothing of the turnstile and needs not to.

All functions may be called by any thread.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

from cfs.errors import BusyError
from cfs.linux.files import naming, open_path

__all__ = ["LockedDirectory", "lock_soon", "open_shared"]

_TURNSTILE = b"meta.json"
_FIRST_SPAN_S = 5.0  # closed that long and then open that long; each further time twice
_LONGEST_SPAN_S = 60.0
_SILENT_S = 1.0
_SHORTEST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.1
_PATIENCE_S = 60.0


def open_shared(path: str | bytes, *, wait: bool = True) -> int:
    """Open a store's directory and lock it shared.

    Args:
        path: of the store.
        wait: wait for as long as it takes; otherwise fail if somebody collects or wants to.

    Returns:
        A descriptor that owns a lock of its own, which goes when it is closed.

    Raises:
        BusyError: the store is locked, and ``wait`` is false.
        OSError: as open(2).
    """
    with naming(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock_shared(fd, wait=wait)
        except BaseException:
            os.close(fd)
            raise
    return fd


class LockedDirectory:
    """A store's directory, open and locked, shared by all who opened it in this process.

    Attributes:
        fd: read-only descriptor of the directory.
    """

    _opened: ClassVar[dict[tuple[int, int], "LockedDirectory"]] = {}  # by device and inode
    _guard: ClassVar[threading.Lock] = threading.Lock()  # of _opened and of all counts

    def __init__(self, fd: int, key: tuple[int, int]) -> None:
        """Own a descriptor that is locked; only for :meth:`open`."""
        self.fd = fd
        self._key = key
        self._nr_users = 1
        self._turn = threading.Lock()

    @classmethod
    def open(cls, path: str | bytes, *, wait: bool = True) -> "LockedDirectory":
        """Return the directory, locked shared; the arguments are those of :func:`open_shared`.

        Raises:
            BusyError: the store is locked, and ``wait`` is false.
            OSError: as open(2).
        """
        with naming(path):
            # while the probe is open, its inode number means this directory and no other one
            probe = open_path(path, os.O_PATH | os.O_DIRECTORY)
            try:
                found = os.fstat(probe)
                key = (found.st_dev, found.st_ino)
                if shared := cls._join(key):
                    return shared
                # without the guard, as this may wait for another process
                fd = open_shared(f"/proc/self/fd/{probe}", wait=wait)
                with cls._guard:
                    if key not in cls._opened:
                        return cls._opened.setdefault(key, cls(fd, key))
                os.close(fd)  # another thread was faster
                return cls._join(key) or cls.open(path, wait=wait)
            finally:
                os.close(probe)

    @classmethod
    def adopt(cls, fd: int) -> "LockedDirectory":
        """Own a descriptor of a directory that another process has locked shared and handed over.

        Raises:
            OSError: as fstat(2).
        """
        found = os.fstat(fd)
        key = (found.st_dev, found.st_ino)
        with cls._guard:
            assert key not in cls._opened
            return cls._opened.setdefault(key, cls(fd, key))

    @classmethod
    def _join(cls, key: tuple[int, int]) -> "LockedDirectory | None":
        with cls._guard:
            shared = cls._opened.get(key)
            if shared is not None:
                shared._nr_users += 1  # noqa: SLF001 - of the same class
            return shared

    def share(self) -> Self:
        """Count another use, which has to be closed as well."""
        with self._guard:
            self._nr_users += 1
        return self

    def close(self) -> None:
        """End one use; the last one closes the directory, which gives up the lock.

        There is no explicit unlocking: that would take the lock from whoever has inherited it.
        """
        with self._guard:
            self._nr_users -= 1
            if self._nr_users == 0:
                del self._opened[self._key]
                os.close(self.fd)
                self.fd = -1

    @contextmanager
    def exclusive(
        self, *, wait: bool = True, on_wait: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Keep all other processes out of the store for the duration of a block.

        Other users in this process are not kept out, only other such blocks.  Whatever was
        read before has to be read again: while it waits, the process has no lock at all.

        Args:
            wait: wait for as long as it takes; otherwise fail if the store is in use.
            on_wait: called once, when it has waited for a second.

        Raises:
            BusyError: the store is in use, and ``wait`` is false.
            OSError: as flock(2).
        """
        if not self._turn.acquire(blocking=wait):
            raise _busy()
        try:
            if wait:
                _wait_exclusive(self.fd, on_wait)
            elif not _try_lock(self.fd, fcntl.LOCK_EX):
                raise _busy()
            yield
        finally:
            try:
                # to have tried in vain has cost the lock that we had, too
                fcntl.flock(self.fd, fcntl.LOCK_SH)
            finally:
                self._turn.release()


def lock_soon(fd: int) -> None:
    """Lock a file exclusively that nobody locks for long.

    Raises:
        BusyError: somebody does; whoever may read it can keep the lock for ever.
        OSError: as flock(2).
    """
    start_s = time.monotonic()
    while not _try_lock(fd, fcntl.LOCK_EX):
        waited_s = time.monotonic() - start_s
        if waited_s > _PATIENCE_S:
            raise _busy()
        time.sleep(_pause_s(waited_s))


def _busy() -> BusyError:
    return BusyError("the repository is in use by another process")


def _lock_shared(fd: int, *, wait: bool) -> None:
    """Go through the turnstile and take the lock, which must not be held already."""
    operation = fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB
    with _turnstile(fd) as turnstile:
        try:
            if turnstile is not None:
                fcntl.flock(turnstile, operation)
            fcntl.flock(fd, operation)
        except BlockingIOError:
            raise _busy() from None


@contextmanager
def _turnstile(fd: int) -> Iterator[int | None]:
    """Open ``meta.json`` for its lock; None if there is nothing of that kind.

    Old stores have none, and who may not read it is refused later on, with a better message.
    """
    try:
        turnstile = open_path(_TURNSTILE, os.O_RDONLY | os.O_NONBLOCK, dir_fd=fd)
    except OSError:
        yield None
        return
    try:
        yield turnstile
    finally:
        os.close(turnstile)


def _try_lock(fd: int, operation: int) -> bool:
    """Lock without waiting; if that fails, a lock held before is gone."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_exclusive(fd: int, on_wait: Callable[[], None] | None) -> None:
    """Poll for the exclusive lock: a blocking flock could not open the turnstile meanwhile.

    Half of the time the turnstile is open, as a ``transaction`` may run many commands.
    """
    start_s = turn_s = time.monotonic()
    span_s, is_closed = _FIRST_SPAN_S, False
    with _turnstile(fd) as turnstile:
        while True:
            now_s = time.monotonic()
            if turnstile is not None and now_s >= turn_s:
                if is_closed:
                    fcntl.flock(turnstile, fcntl.LOCK_UN)
                    is_closed, turn_s = False, now_s + span_s
                    span_s = min(2 * span_s, _LONGEST_SPAN_S)
                elif _try_lock(turnstile, fcntl.LOCK_EX):
                    is_closed, turn_s = True, now_s + span_s
            if _try_lock(fd, fcntl.LOCK_EX):
                return
            waited_s = now_s - start_s
            if on_wait is not None and waited_s > _SILENT_S:
                on_wait()
                on_wait = None
            time.sleep(_pause_s(waited_s))


def _pause_s(waited_s: float) -> float:
    """Return how long to wait for a lock before the next try: the longer the rarer."""
    return min(max(waited_s / 20, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)
