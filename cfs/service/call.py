"""One call, as the methods see it: peer, flags, descriptors, end of the client."""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cfs.service.watcher import has_hung_up

__all__ = ["Call", "Disconnection", "Peer", "Replies", "close_fds"]

Replies = Iterator[tuple[dict[str, Any], bool]]
"""Parameters of replies, each with whether more follow."""

_log = logging.getLogger(__name__)


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors; those that are closed already do not matter."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, at the time of connect(2).

    Attributes:
        pid: process; by now it may be another one, so it grants nothing.
        uid: effective user.
        gid: effective group.
        groups: supplementary groups.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]


class Disconnection:
    """What to do once the peer has gone.  Any thread may call."""

    def __init__(self, watch: Callable[[], None] = lambda: None) -> None:
        """Take what has the connection watched; it is called with the first callback."""
        self._lock = threading.Lock()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._has_happened = False
        self._watch = watch

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called once, at once if the peer has gone; return what revokes it."""
        key = object()
        with self._lock:
            has_happened = self._has_happened
            if not has_happened:
                self._callbacks[key] = callback
        if has_happened:
            callback()
        else:
            self._watch()

        def revoke() -> None:
            with self._lock:
                self._callbacks.pop(key, None)

        return revoke

    def happen(self) -> None:
        """Call all callbacks, the last one first; a failing one does not stop the others."""
        with self._lock:
            self._has_happened = True
            callbacks, self._callbacks = self._callbacks, {}
        for callback in reversed(callbacks.values()):
            try:
                callback()
            except Exception:  # noqa: BLE001 - one's failure is not the others'
                _log.exception("cleaning up after a client failed")


class Call:
    """A call under way; for the thread that runs it, but for :meth:`on_disconnect`.

    Attributes:
        peer: who calls.
        more: several replies are welcome.
        oneway: no reply is sent.
    """

    def __init__(
        self,
        fileno: int,
        peer: Peer,
        disconnection: Disconnection,
        *,
        more: bool = False,
        oneway: bool = False,
        fds: Iterable[int] = (),
    ) -> None:
        """Describe a call on the connected socket ``fileno``; ``fds`` become the call's."""
        self.peer = peer
        self.more = more
        self.oneway = oneway
        self._fileno = fileno
        self._disconnection = disconnection
        self._fds = list(fds)
        self._reply_fds: list[int] = []

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors received with the call; they are closed when it ends."""
        return tuple(self._fds)

    def take(self) -> list[int]:
        """Hand over the received descriptors: the caller closes them."""
        taken, self._fds = self._fds, []
        return taken

    def reply_fds(self, fds: Iterable[int]) -> None:
        """Attach descriptors to the next reply; they are closed after it, sent or not."""
        self._reply_fds.extend(fds)

    def take_reply_fds(self) -> list[int]:
        """Hand the attached descriptors over to who sends the reply."""
        taken, self._reply_fds = self._reply_fds, []
        return taken

    def fileno(self) -> int:
        """Return the connected socket, for poll(2) on ``POLLHUP`` while the call lasts."""
        return self._fileno

    def gone(self) -> bool:
        """Tell whether the peer has closed its end; a half close does not count."""
        return has_hung_up(self._fileno)

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called once when the peer is gone, during this call or after it.

        It may run in any thread, and must not block.

        Returns:
            What revokes it.
        """
        return self._disconnection.add(callback)

    def close(self) -> None:
        """Close all descriptors that nobody took."""
        close_fds(self.take())
        close_fds(self.take_reply_fds())
