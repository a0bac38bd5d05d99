"""Open stores and the numbers that clients know them by (spec cli-and-varlink b.3).

A handle belongs to the service: all connections of the user who opened it may use it, and it
stays until it is closed.  To others it does not exist.

All handles of a store share its one lock, and each call uses a repository of its own, which lasts
even if the handle is closed meanwhile.  The store's lock keeps other processes out of a collection.
What runs in this process is kept out by a count of uses.

Any thread may call.  State: ``_condition`` guards all, and is held for moments; changed uses
notify it.
"""

import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cfs.digest import Algorithm
from cfs.errors import BusyError
from cfs.repository.repository import Repository
from cfs.service.budget import Budget
from cfs.service.errors import MethodError, internal_error
from cfs.service.rights import as_peer, is_foreign, trusted_uids

if TYPE_CHECKING:
    from cfs.service.call import Call

__all__ = ["Handles", "Opened", "StoreOptions", "retry_busy"]

_HANDLES_PER_UID, _HANDLES = 10_000, 100_000
_PART_PER_UID, _PART = 8, 2  # of the process's descriptors, one for each store
_OPEN_WAIT_S = 30.0  # for a collection of another process
_OPEN_PAUSE_S = 0.05
_EXCLUSIVE_WAIT_S = 10.0
_HOLD_BACK_S = 0.25  # new uses, for one that shall be exclusive
_LOOK_S = 0.5  # how often whoever waits looks whether its client is still there

_T = TypeVar("_T")
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


class Handles:
    """The open stores of the service."""

    def __init__(self, options: StoreOptions) -> None:
        """Open stores with these options; there are no handles yet."""
        self.options = options
        self._condition = threading.Condition()
        self._last = 0
        self._entries: dict[int, _Entry] = {}
        self._held: Counter[tuple[int, _Key]] = Counter()  # handles of a user to a store
        self._uses: Counter[_Key] = Counter()
        self._exclusive: set[_Key] = set()
        self._nr_wanting: Counter[_Key] = Counter()  # exclusive use, for which others make room
        trusted = trusted_uids()
        max_fds = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # the server raises its own
        self._handle_budget = Budget(per_uid=_HANDLES_PER_UID, total=_HANDLES, trusted=trusted)
        self._store_budget = Budget(
            per_uid=max_fds // _PART_PER_UID, total=max_fds // _PART, trusted=trusted
        )

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
        uid = call.peer.uid
        if not self._handle_budget.take(uid, 1):
            raise _too_many(uid)
        try:
            repository, device = self._open_as(call, path)
            try:
                return self._register(uid, repository, device)
            except BaseException:
                repository.close()
                raise
        except BaseException:
            self._handle_budget.give_back(uid, 1)
            raise

    def _open_as(self, call: "Call", path: str) -> tuple[Repository, int | None]:
        """Open a store with the rights of the peer; return it with the device of its objects."""
        with as_peer(call.peer):
            repository = retry_busy(
                call,
                lambda: Repository.open(
                    path,
                    upgrade=self.options.upgrade,
                    require_verity=self.options.require_verity,
                    insecure=self.options.insecure,
                    wait=False,
                ),
            )
            try:
                if is_foreign(call.peer):
                    # the descriptor may be one that this process had before, with other rights
                    os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=repository.fd))
                return repository, _objects_device(repository.fd)
            except BaseException:
                repository.close()
                raise

    def _register(self, uid: int, repository: Repository, device: int | None) -> Opened:
        found = os.fstat(repository.fd)
        key = (found.st_dev, found.st_ino)
        with self._condition:
            if not self._held[uid, key] and not self._store_budget.take(uid, 1):
                raise _too_many(uid)
            self._held[uid, key] += 1
            self._last += 1
            self._entries[self._last] = _Entry(uid, repository, key)
            return Opened(self._last, repository.algorithm, device)

    @contextmanager
    def get(self, call: "Call", handle: int) -> Iterator[Repository]:
        """Use a store for the duration of a block, once no collection of ours has it alone.

        Until then the thread acts with the rights of the peer.  The use is the thread's: others
        begin their own.

        Raises:
            MethodError: ``InvalidHandle``: the peer has no such handle; ``InternalError``: its
                client left while it waited.
        """
        with self._condition:
            key = self._find(call, handle).key
            while key in self._exclusive or self._nr_wanting[key]:
                self._wait(call)
            repository = self._find(call, handle).repository.share()
            self._uses[key] += 1
        try:
            with as_peer(call.peer), repository:
                yield repository
        finally:
            with self._condition:
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]
                self._condition.notify_all()

    @contextmanager
    def exclusive(self, call: "Call", handle: int) -> Iterator[Repository]:
        """Use a store for the duration of a block, as the only one in this process.

        New uses are held back for a moment, so that those under way can end: without that, many
        short ones would never leave a gap.  After that the long ones are waited for.

        Raises:
            MethodError: as :meth:`get`, also if other uses last too long.
        """
        deadline_s = time.monotonic() + _EXCLUSIVE_WAIT_S
        with self._condition:
            key = self._find(call, handle).key
            self._hold_back(key)
            while self._is_used(key):
                if time.monotonic() > deadline_s:
                    msg = "the repository is in use by other calls"
                    raise internal_error(msg)
                self._wait(call)
            repository = self._find(call, handle).repository.share()
            self._exclusive.add(key)
        try:
            with as_peer(call.peer), repository:
                yield repository
        finally:
            with self._condition:
                self._exclusive.remove(key)
                self._condition.notify_all()

    def _hold_back(self, key: _Key) -> None:
        self._nr_wanting[key] += 1
        try:
            self._condition.wait_for(lambda: not self._is_used(key), _HOLD_BACK_S)
        finally:
            self._nr_wanting[key] -= 1
            if not self._nr_wanting[key]:
                del self._nr_wanting[key]
            self._condition.notify_all()

    def _is_used(self, key: _Key) -> bool:
        return key in self._exclusive or key in self._uses

    def close(self, call: "Call", handle: int) -> None:
        """Give a handle back; uses go on.

        Raises:
            MethodError: ``InvalidHandle``.
        """
        with self._condition:
            entry = self._find(call, handle)
            del self._entries[handle]
            owned = (entry.uid, entry.key)
            self._held[owned] -= 1
            if not self._held[owned]:
                del self._held[owned]
                self._store_budget.give_back(entry.uid, 1)
            self._handle_budget.give_back(entry.uid, 1)
        entry.repository.close()

    def close_all(self) -> None:
        """Close what is open, at the end of the service; uses go on."""
        with self._condition:
            entries, self._entries = self._entries, {}
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


def retry_busy(call: "Call", attempt: Callable[[], _T]) -> _T:
    """Try until no other process has the store alone; for a while, and as long as the client waits.

    Raises:
        BusyError: in vain.
        Exception: whatever else ``attempt`` raises.
    """
    deadline_s = time.monotonic() + _OPEN_WAIT_S
    while True:
        try:
            return attempt()
        except BusyError:
            if time.monotonic() > deadline_s or call.gone():
                raise
        time.sleep(_OPEN_PAUSE_S)


def _objects_device(directory_fd: int) -> int | None:
    """Return the device of a store's objects; until there are some, where they will be."""
    try:
        return os.stat("objects", dir_fd=directory_fd, follow_symlinks=False).st_dev
    except FileNotFoundError:
        return os.fstat(directory_fd).st_dev
    except OSError:
        return None


def _too_many(uid: int) -> MethodError:
    return internal_error(f"user {uid} has too many open repositories")
