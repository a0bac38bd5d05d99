"""Open stores and the numbers that clients know them by (spec cli-and-varlink b.3).

A handle belongs to the service: all connections of the user who opened it may use it, and it
stays until it is closed.  To others it does not exist.

All handles of a store share its one lock, and each call has its own use of the store
(:class:`OpenStore`), which lasts even if the handle is closed meanwhile.  The store's lock keeps
other processes out of a collection.  What runs in this process is kept out by a count of uses.

Any thread may call.  State: ``_condition`` guards all, and is held for moments; changed uses
notify it.
"""

import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cfs.digest import Algorithm
from cfs.errors import BusyError
from cfs.repository.repository import Repository
from cfs.service.errors import MethodError
from cfs.service.failures import internal_error
from cfs.service.rights import as_peer, is_foreign

if TYPE_CHECKING:
    from cfs.service.call import Call

__all__ = ["Handles", "OpenStore", "Opened", "StoreOptions"]

_MAX_HANDLES = 10_000  # of a user
_STORES_SHARE = 8  # a user's stores may take that part of the process's descriptors
_OPEN_WAIT_S = 30.0  # for a collection of another process
_OPEN_PAUSE_S = 0.05
_EXCLUSIVE_WAIT_S = 10.0
_LOOK_S = 0.5  # how often whoever waits looks whether its client is still there

_Key = tuple[int, int]  # device and inode of a store's directory


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How the service opens stores.

    Attributes:
        insecure: do without fs-verity where it is missing.
        require_verity: open only secure stores.
        upgrade: convert stores from before ``meta.json``.
    """

    insecure: bool = False
    require_verity: bool = False
    upgrade: bool = True


class _Entry(NamedTuple):
    """A handle: whose it is, the store, which is never used itself, and its identity."""

    uid: int
    repository: Repository
    key: _Key


class Opened(NamedTuple):
    """A new handle.

    Attributes:
        handle: its number.
        algorithm: of the store.
        objects_device: device number of the objects; None if nobody may know it.
    """

    handle: int
    algorithm: Algorithm
    objects_device: int | None


class OpenStore(NamedTuple):
    """A call's use of a store: a repository of its own, though others may have the store open."""

    repository: Repository


class Handles:
    """The open stores of the service."""

    def __init__(self, options: StoreOptions) -> None:
        """Open stores with these options; there are no handles yet."""
        self.options = options
        self._condition = threading.Condition()
        self._last = 0
        self._entries: dict[int, _Entry] = {}
        self._stores: dict[int, Counter[_Key]] = {}  # of a user, with their handles
        self._uses: Counter[_Key] = Counter()
        self._exclusive: set[_Key] = set()

    def open_store(self, call: "Call", path: str) -> Opened:
        """Open a store with the rights of the peer.

        Args:
            call: whose peer it shall belong to.
            path: of the store.

        Raises:
            MethodError: ``InternalError``: he has too many already.
            BusyError: another process collects.
            CfsError: as :meth:`cfs.repository.repository.Repository.open`.
            OSError: likewise.
        """
        peer = call.peer
        self._check_limits(peer.uid)
        with as_peer(peer):
            repository = self._open(call, path)
            try:
                if is_foreign(peer):
                    # the descriptor may be one that this process had before, with other rights
                    os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=repository.fd))
                found = os.fstat(repository.fd)
                device = _objects_device(repository.fd)
            except BaseException:
                repository.close()
                raise
        key = (found.st_dev, found.st_ino)
        with self._condition:
            self._last += 1
            self._entries[self._last] = _Entry(peer.uid, repository, key)
            self._stores.setdefault(peer.uid, Counter())[key] += 1
            return Opened(self._last, repository.algorithm, device)

    def _check_limits(self, uid: int) -> None:
        """Refuse a user who holds too much; a few more may slip in at the same time."""
        max_stores = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _STORES_SHARE
        with self._condition:
            stores = self._stores.get(uid, Counter())
            if stores.total() >= _MAX_HANDLES or len(stores) >= max_stores:
                msg = f"user {uid} has too many open repositories"
                raise internal_error(msg)

    def _open(self, call: "Call", path: str) -> Repository:
        deadline_s = time.monotonic() + _OPEN_WAIT_S
        while True:
            try:
                return Repository.open(
                    path,
                    upgrade=self.options.upgrade,
                    require_verity=self.options.require_verity,
                    insecure=self.options.insecure,
                    wait=False,
                )
            except BusyError:
                if time.monotonic() > deadline_s or call.gone():
                    raise
            time.sleep(_OPEN_PAUSE_S)

    @contextmanager
    def get(self, call: "Call", handle: int) -> Iterator[OpenStore]:
        """Use a store for the duration of a block, once no collection of ours has it alone.

        Until then the thread acts with the rights of the peer.  The use is the thread's: others
        begin their own.

        Raises:
            MethodError: ``InvalidHandle``: the peer has no such handle; ``InternalError``: its
                client left while it waited.
        """
        with self._condition:
            key = self._find(call, handle).key
            while key in self._exclusive:
                self._wait(call)
            repository = self._find(call, handle).repository.share()
            self._uses[key] += 1
        try:
            with as_peer(call.peer), repository:
                yield OpenStore(repository)
        finally:
            with self._condition:
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]
                self._condition.notify_all()

    @contextmanager
    def exclusive(self, call: "Call", handle: int) -> Iterator[OpenStore]:
        """Use a store for the duration of a block, as the only one in this process.

        Raises:
            MethodError: as :meth:`get`, also if other uses last too long.
        """
        deadline_s = time.monotonic() + _EXCLUSIVE_WAIT_S
        with self._condition:
            key = self._find(call, handle).key
            while key in self._exclusive or key in self._uses:
                if time.monotonic() > deadline_s:
                    msg = "the repository is in use by other calls"
                    raise internal_error(msg)
                self._wait(call)
            repository = self._find(call, handle).repository.share()
            self._exclusive.add(key)
        try:
            with as_peer(call.peer), repository:
                yield OpenStore(repository)
        finally:
            with self._condition:
                self._exclusive.remove(key)
                self._condition.notify_all()

    def close(self, call: "Call", handle: int) -> None:
        """Give a handle back; uses go on.

        Raises:
            MethodError: ``InvalidHandle``.
        """
        with self._condition:
            entry = self._find(call, handle)
            del self._entries[handle]
            stores = self._stores[entry.uid]
            stores[entry.key] -= 1
            if not stores[entry.key]:
                del stores[entry.key]
            if not stores:
                del self._stores[entry.uid]
        entry.repository.close()

    def close_all(self) -> None:
        """Close what is open, at the end of the service; uses go on."""
        with self._condition:
            entries, self._entries = self._entries, {}
            self._stores.clear()
        for entry in entries.values():
            entry.repository.close()

    def _find(self, call: "Call", handle: int) -> _Entry:
        entry = self._entries.get(handle)
        if entry is None or entry.uid != call.peer.uid:
            raise MethodError("InvalidHandle", {"handle": handle})
        return entry

    def _wait(self, call: "Call") -> None:
        """Wait until uses change, or for a moment."""
        self._condition.wait(_LOOK_S)
        if call.gone():
            raise internal_error("the client has left")


def _objects_device(directory_fd: int) -> int | None:
    """Return the device of a store's objects; until there are some, where they will be."""
    try:
        return os.stat("objects", dir_fd=directory_fd, follow_symlinks=False).st_dev
    except FileNotFoundError:
        return os.fstat(directory_fd).st_dev
    except OSError:
        return None
