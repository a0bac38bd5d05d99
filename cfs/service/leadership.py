"""Threads that take turns at leading: one waits for all that is idle, and serves what is ready.

What is over at once the leader serves itself, one thing after the other, without any change of
threads.  Before something that may last it hands the lead over (:meth:`Leadership.hand_over`): the
item is its own then, another thread leads, and when it is done the item is idle again.  Something
may last all the same, for example on a file system that does not answer.  So while the leader works
another thread, the guard, looks now and then whether it is still at the same thing, and takes the
lead if so.  If there is nothing to do, no thread wakes up.

Any thread may call.  State: ``_condition`` guards who leads and what is idle.  ``_serial`` and
``_current`` are the leader's, who writes them without it; the guard reads them.
"""

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from threading import get_ident
from typing import Generic, Protocol, TypeVar

from cfs.service.rights import as_service

__all__ = ["MAX_FOLLOWERS", "Leadership"]

MAX_FOLLOWERS = 4  # that wait for something to do
_LOOK_S = 0.005  # between two looks of the guard
_NR_LOOKS = 4  # at one item; a busy machine may keep the leader from getting on in between
_START_PAUSE_S = 1.0  # after a thread that could not be started
_log = logging.getLogger(__name__)


class _Item(Protocol):
    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to do."""
        ...


_T = TypeVar("_T", bound=_Item)


class Leadership(Generic[_T]):
    """Serves items that become readable, each by one thread at a time, in fair turns."""

    def __init__(self, serve: Callable[[_T], bool], end: Callable[[_T], None]) -> None:
        """Prepare; nothing is served before :meth:`start`.

        Args:
            serve: does what is to be done for a readable item, once; returns whether it stays.
                Raises nothing.
            end: closes an item that does not stay, or :meth:`stop` finds idle.
        """
        self._serve_item = serve
        self._end_item = end
        self._condition = threading.Condition()
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(1, os.EFD_CLOEXEC)  # readable; looked at once the end has come
        self._idle: dict[int, _T] = {}  # by descriptor; with the one that the leader serves
        self._threads: set[threading.Thread] = set()
        self._nr_followers = 0
        self._leader: int | None = None
        self._current: _T | None = None
        self._serial = 0
        self._is_guarded = False
        self._is_guard_wanted = False
        self._is_stopping = False
        self._start_s = 0.0

    def start(self) -> None:
        """Start a thread, the first leader; later ones are made by it.

        Raises:
            RuntimeError: no thread is left.
        """
        with self._condition:
            if not self._start_thread():
                msg = "cannot start a thread"
                raise RuntimeError(msg)

    def add(self, item: _T) -> None:
        """Have an item served whenever it is readable."""
        with self._condition:
            self._insert(item)

    def hand_over(self) -> None:
        """Have another thread lead, if the calling one does; not within ``as_peer``.

        If there is none and none can be started, it goes on as leader, and the others wait.
        """
        if self._leader != get_ident():
            return
        with self._condition:
            if self._leader == get_ident() and (self._nr_followers or self._start_thread()):
                self._dismiss()
                self._condition.notify()

    def stop(self) -> None:
        """Have the threads end; :meth:`join` is still needed."""
        with self._condition:
            self._is_stopping = True
            if self._current is not None:
                self._dismiss()
            self._epoll.register(self._wakeup, select.EPOLLIN)
            self._condition.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the end of the threads for a while, then end what is idle."""
        deadline_s = time.monotonic() + seconds
        with self._condition:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0, deadline_s - time.monotonic()))
        with self._condition:
            items = [item for item in self._idle.values() if item is not self._current]
            self._idle = {}
        for item in items:
            self._end_item(item)
        self._epoll.close()
        os.close(self._wakeup)

    def _run(self) -> None:
        while self._follow():
            while self._lead():
                pass
        with self._condition:
            self._threads.remove(threading.current_thread())

    def _follow(self) -> bool:
        """Wait for the lead; return whether the thread has it: else nobody needs the thread."""
        with self._condition:
            if self._nr_followers >= MAX_FOLLOWERS and not self._is_guard_wanted:
                return False
            self._nr_followers += 1
            while self._leader is not None and not self._is_stopping:
                if self._is_guard_wanted:
                    self._is_guard_wanted = False
                    self._guard()
                else:
                    self._condition.wait()
            self._nr_followers -= 1
            if self._is_guard_wanted:  # whoever was to be the guard may be the leader now
                self._is_guard_wanted = self._is_guarded = False
            if not self._is_stopping:
                self._leader = get_ident()
        return not self._is_stopping

    def _lead(self) -> bool:
        """Serve what is ready, each item once; return whether the thread leads still."""
        events = self._epoll.poll()
        return all(self._serve(fd) for fd, _ in events)

    def _serve(self, fd: int) -> bool:
        """Serve an item; return whether the thread leads still."""
        if self._is_stopping:
            return False
        item = self._idle[fd]
        self._serial += 1  # first: the guard looks at it after it has said that it leaves
        if not self._is_guarded:
            self._call_guard()
        self._current = item
        stays = self._serve_item(item)
        with self._condition:
            leads = self._leader == get_ident()
            stays = stays and not self._is_stopping
            if leads:
                self._current = None
                if not stays:
                    self._remove(item)
            elif stays:
                self._insert(item)
        if not stays:
            self._end_item(item)
        return leads

    def _call_guard(self) -> None:
        with self._condition:
            if self._nr_followers or self._start_thread():
                self._is_guarded = self._is_guard_wanted = True
                self._condition.notify()

    def _guard(self) -> None:
        """Watch the leader until it has nothing to do; dismiss it if it does not get on."""
        nr_looks, serial = 0, self._serial
        while self._leader is not None and not self._is_stopping:
            self._condition.wait(_LOOK_S)
            if self._serial != serial:
                nr_looks, serial = 0, self._serial
            elif self._current is None:
                self._is_guarded = False
                if self._serial == serial:  # else the leader has found a guard, and relies on it
                    return
                self._is_guarded = True
            elif (nr_looks := nr_looks + 1) == _NR_LOOKS:
                self._dismiss()
        self._is_guarded = False

    def _dismiss(self) -> None:
        """Take the lead from its thread, which keeps the item that it serves."""
        item, self._current = self._current, None
        if item is not None:
            self._remove(item)
        self._leader = None

    def _insert(self, item: _T) -> None:
        self._idle[item.fileno()] = item
        self._epoll.register(item.fileno(), select.EPOLLIN)

    def _remove(self, item: _T) -> None:
        """Forget an item, before its descriptor is closed: a child may hold a copy for a moment."""
        self._epoll.unregister(item.fileno())
        del self._idle[item.fileno()]

    def _start_thread(self) -> bool:
        now_s = time.monotonic()
        if now_s < self._start_s:
            return False
        thread = threading.Thread(target=self._run, name="service", daemon=True)
        try:
            with as_service():  # threads inherit rights, and the lead may be given away for a peer
                thread.start()
        except RuntimeError as error:
            self._start_s = now_s + _START_PAUSE_S
            _log.warning("others may have to wait: %s", error)
            return False
        self._threads.add(thread)
        return True
