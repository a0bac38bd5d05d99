"""The FUSE mounts of the service (spec cli-and-varlink c.3 and c.4).

Each mount has a supervisor, a process of its own, to which we hold one end of a channel.  When
all copies of that end are closed, the supervisor takes the mount down.  So a service that dies
takes its mounts along, unless systemd's descriptor store has copies: then they live on while the
service restarts, and the next service adopts them; at a real stop systemd closes its copies, and
they end as well.  Nothing has to know which of it is happening.  The FUSE device is not stored: who
holds it keeps a mount alive whose servers have died, and its users would hang instead of failing.

Any thread may call.  State: ``_lock`` guards the table and the state of the entries, and is held
for moments.  One thread waits for the ends of all supervisors; it starts with the first mount.
"""

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from cfs.errors import CfsError
from cfs.fuse.adopted import AdoptedProcess, clear_away
from cfs.fuse.mounts import Mount
from cfs.fuse.options import Passthrough, ServeOptions
from cfs.linux.mountinfo import MountEntry, list_mounts
from cfs.service.activation import STORED_PREFIX
from cfs.service.call import close_fds
from cfs.service.errors import MethodError
from cfs.service.fuse_entry import MODE_NAMES, FuseEntry, FuseState
from cfs.service.rights import as_service, trusted_uids

if TYPE_CHECKING:
    from cfs.linux.notify import Notifier
    from cfs.service.call import Call, Peer

__all__ = ["FuseMounts"]

# names in the descriptor store: STORED_PREFIX, number of the mount, role
_COUNTER = f"{STORED_PREFIX}0.last"
_ROLES = ("channel", "state", "pidfd", "record")
# of an entry, for the service after us
_RECORDED = ("number", "image", "owner_uid", "mountpoint", "mode", "wants_passthrough", "started")
_KEPT_SECONDS = 60.0
_MAX_MOUNTS = 1000  # of a user, and of all foreign ones; processes of 30 MB
_MAX_LISTED = 10_000  # those that ended a moment ago included
_CLOSE_SECONDS = 10.0
_RECORD_SIZE = 64 * 1024
_log = logging.getLogger(__name__)


class FuseMounts:
    """All FUSE mounts of a service.

    Args:
        notify: keeps mounts over a restart of the service, or None.
        records: directory of the records that ``cfsctl ps`` reads, or None.

    Attributes:
        records: the same.
    """

    def __init__(self, notify: "Notifier | None" = None, *, records: str | None = None) -> None:
        self.records = records
        self._notifier = notify
        self._lock = threading.Lock()
        self._entries: dict[int, FuseEntry] = {}
        self._stored: set[int] = set()
        self._last = 0
        self._counter_fd = -1  # holds the same over restarts, from the first stored mount on
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup_writer.settimeout(0)

    def add(
        self, peer: "Peer", image: str, mountpoint: str | None, options: ServeOptions
    ) -> FuseEntry:
        """Return a new mount, in state Starting.

        Raises:
            MethodError: ``MountFailed``: the user has too many, or the service ends.
        """
        with self._lock:
            self._forget_old()
            if self._is_closed or not self._has_room(peer.uid):
                reason = "the service ends" if self._is_closed else "too many mounts of this user"
                raise MethodError("MountFailed", message=reason)
            self._last += 1
            self._save_last()
            entry = FuseEntry(
                number=self._last,
                image=image,
                owner_uid=peer.uid,
                mountpoint=mountpoint,
                mode=MODE_NAMES[options.mode],
                wants_passthrough=options.passthrough is Passthrough.ON,
            )
            self._entries[entry.number] = entry
        return entry

    def serve(self, entry: FuseEntry, mount: Mount, *, is_lasting: bool) -> None:
        """Go on to state Serving.

        Args:
            entry: in state Starting.
            mount: which serves; ours from now on.
            is_lasting: it shall survive a restart of the service.

        Raises:
            OSError: no descriptors are left; the mount ends.
        """
        try:
            pidfd = os.pidfd_open(mount.pid)  # our child, not waited for: never another process
        except OSError:
            mount.end()
            mount.close()
            raise
        with self._lock:
            entry.mount, entry.pidfd, entry.started = mount, pidfd, int(time.time())
            entry.mountpoint = mount.mountpoint or None
            entry.state = FuseState.SERVING
            is_closed = self._is_closed
        if is_lasting:
            with suppress(OSError):  # no descriptors are left: it ends with this service, then
                self._store(entry)
        self._tell(entry)
        self._watch()
        if is_closed:
            self.end(entry)

    def fail(self, entry: FuseEntry, reason: str) -> None:
        """Go from Starting to state Failed."""
        self._finish(entry, FuseState.FAILED, reason)

    def visible(self, peer: "Peer", number: int | None = None) -> list[FuseEntry]:
        """Return the mounts that a peer may see, or the one with a number.

        Raises:
            MethodError: ``NoSuchMount``.
        """
        with self._lock:
            self._forget_old()
            entries = [e for e in self._entries.values() if peer.uid in (0, e.owner_uid)]
        if number is None:  # systemd hands over what it kept in an order of its own
            return sorted(entries, key=lambda entry: entry.number)
        found = [entry for entry in entries if entry.number == number]
        if not found:
            raise MethodError("NoSuchMount", mount_id=number)
        return found

    def describe(self, entries: Sequence[FuseEntry]) -> list[dict[str, Any]]:
        """Return mounts as ``FuseMount``, where they are now."""
        mounts: dict[int, list[MountEntry]] = {}
        for mounted in list_mounts():
            mounts.setdefault(mounted.device, []).append(mounted)
        described = []
        for entry in entries:
            fields = entry.describe()
            if entry.mount is not None and fields["state"] == FuseState.SERVING.value:
                fields["mountpoint"] = entry.find_place(mounts.get(entry.mount.device, ()))
            described.append(fields)
        return described

    @contextmanager
    def watching(self, entry: FuseEntry) -> Iterator[socket.socket]:
        """Have a byte for each change of a mount in a socket; it stays listed meanwhile."""
        reader, writer = socket.socketpair()
        with reader, writer:
            writer.settimeout(0)
            with self._lock:
                entry.watchers.append(writer)
            try:
                yield reader
            finally:
                with self._lock:
                    entry.watchers.remove(writer)

    def end(self, entry: FuseEntry) -> None:
        """Have a mount taken down: out of the tree at once, its users get a moment; do not wait."""
        with self._lock:
            entry.is_ending = True
            mount = entry.mount
        if mount is not None and not entry.state.is_final:
            with entry.lock:
                mount.end()

    def tie(self, entry: FuseEntry, call: "Call") -> None:
        """Have a mount end when the client of a call goes."""
        untie = call.on_disconnect(partial(self.end, entry))
        with self._lock:
            entry.untie = untie
            is_final = entry.state.is_final
        if is_final:
            untie()

    def wait_ended(self, entries: Sequence[FuseEntry], seconds: float) -> bool:
        """Wait until mounts have ended, at most so long; return whether they have."""
        deadline = time.monotonic() + seconds
        for entry in entries:
            with self.watching(entry) as changes:
                poll = select.poll()
                poll.register(changes, select.POLLIN)
                while not entry.state.is_final:
                    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                        return False
                    changes.recv(1)
        return True

    def adopt(self, stored: Mapping[str, Sequence[int]]) -> None:
        """Go on with the mounts of the service before us; what is of no use is closed.

        Args:
            stored: descriptors by their names, from systemd; ours from now on.
        """
        stored = {**stored}
        counters = stored.pop(_COUNTER, ())
        if counters:
            self._counter_fd = counters[0]
            self._last = int(os.pread(self._counter_fd, _RECORD_SIZE, 0) or b"0")
            close_fds(counters[1:])
        groups: dict[str, dict[str, int]] = {}
        for name, fds in stored.items():
            number, _, role = name.removeprefix(STORED_PREFIX).partition(".")
            close_fds(fds[1:])
            groups.setdefault(number, {})[role] = fds[0]
        for number, group in groups.items():
            try:
                record = json.loads(os.pread(group["record"], _RECORD_SIZE, 0))
                if {"channel", "pidfd"} <= group.keys():
                    self._adopt(group, record)
                    continue
                # its supervisor ended meanwhile: systemd drops what has hung up
                clear_away(record["place"], record["device"], record["pid"], group.pop("state", -1))
            except (KeyError, TypeError, ValueError, OSError, CfsError) as error:
                _log.warning("cannot go on with mount %s: %s", number, error)
            close_fds(group.values())
            self._drop(number)
        self._watch()

    def close(self) -> None:
        """Let go of all mounts: those in the descriptor store live on, all others end."""
        with self._lock:
            self._is_closed = True
            keeps = self._notifier is not None and self._notifier.stores
            kept = self._stored if keeps else set()
            entries = [e for e in self._entries.values() if e.number not in kept]
        for entry in entries:
            self.end(entry)
        self.wait_ended([e for e in entries if e.state is not FuseState.STARTING], _CLOSE_SECONDS)
        self._wakeup_writer.close()
        if self._thread is not None:
            self._thread.join()
        self._wakeup.close()
        close_fds([self._counter_fd] if self._counter_fd >= 0 else [])
        for entry in self._entries.values():
            if entry.pidfd >= 0:
                os.close(entry.pidfd)
                entry.pidfd = -1
            if entry.mount is not None:
                with entry.lock:
                    entry.mount.close()

    def _adopt(self, group: Mapping[str, int], record: dict[str, Any]) -> None:
        """Make an entry of the descriptors of a mount."""
        with ExitStack() as stack:
            channel = stack.enter_context(socket.socket(fileno=os.dup(group["channel"])))
            process = AdoptedProcess(record["pid"], group["pidfd"], channel)
            state = os.dup(group["state"]) if "state" in group else -1
            mount = Mount(record["place"], record["device"], process, channel, state)
            entry = FuseEntry(**record["entry"], state=FuseState.SERVING, mount=mount)
            entry.pidfd = group["pidfd"]
            stack.pop_all()
        close_fds(fd for role, fd in group.items() if role != "pidfd")
        with self._lock:
            self._last = max(self._last, entry.number)
            self._entries[entry.number] = entry
            self._stored.add(entry.number)

    def _store(self, entry: FuseEntry) -> None:
        """Give the descriptors of a mount to systemd, and wait until it has them."""
        if self._notifier is None or entry.mount is None:
            return
        with self._lock:
            if self._counter_fd < 0:
                self._counter_fd = os.memfd_create("cfs-counter", os.MFD_CLOEXEC)
                self._notifier.keep(_COUNTER, self._counter_fd)
            self._save_last()
        record = {
            "pid": entry.mount.pid,
            "place": entry.mount.mountpoint,
            "device": entry.mount.device,
            "entry": {name: getattr(entry, name) for name in _RECORDED},
        }
        fd = os.memfd_create("cfs-record", os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, json.dumps(record).encode(), 0)
            fds = {**entry.mount.descriptors(), "pidfd": entry.pidfd, "record": fd}
            with self._lock:
                self._stored.add(entry.number)
            for role in _ROLES:
                if fds[role] >= 0:
                    self._notifier.keep(f"{STORED_PREFIX}{entry.number}.{role}", fds[role])
            self._notifier.barrier()
        finally:
            os.close(fd)

    def _save_last(self) -> None:
        if self._counter_fd >= 0:
            os.pwrite(self._counter_fd, b"%d" % self._last, 0)

    def _drop(self, number: object) -> None:
        if self._notifier is not None:
            for role in _ROLES:
                self._notifier.drop(f"{STORED_PREFIX}{number}.{role}")

    def _watch(self) -> None:
        """Have the thread look at all supervisors anew; start it if it does not run yet."""
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="cfs-mounts", daemon=True)
                with as_service():  # for whomever it was asked
                    self._thread.start()
        with suppress(OSError):  # full: it will look anyway; closed: the service ends
            self._wakeup_writer.send(b"\0")

    def _run(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._wakeup, select.POLLIN)
            with self._lock:
                running = {e.pidfd: e for e in self._entries.values() if e.pidfd >= 0}
            for pidfd in running:
                poll.register(pidfd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self._wakeup.fileno() in ready and not self._wakeup.recv(_RECORD_SIZE):
                return
            for pidfd in ready & running.keys():
                self._bury(running[pidfd])

    def _bury(self, entry: FuseEntry) -> None:
        """Take note of the end of a supervisor."""
        assert entry.mount is not None
        words = entry.mount.last_words()
        error = None
        try:
            with entry.lock:
                status = entry.mount.wait()
            if status < 0:  # killed: its session may serve on, and nobody would look after that
                entry.mount.unmount()
        except (CfsError, OSError) as failure:
            status, words = 1, words or str(failure)
        if status and not entry.is_ending:
            error = words or f"the server ended with status {status}"
        with self._lock:
            pidfd, entry.pidfd = entry.pidfd, -1
            is_stored = entry.number in self._stored
            self._stored.discard(entry.number)
        os.close(pidfd)
        if is_stored:
            self._drop(entry.number)
        self._finish(entry, FuseState.ENDED if error is None else FuseState.FAILED, error)

    def _finish(self, entry: FuseEntry, state: FuseState, error: str | None) -> None:
        with self._lock:
            entry.state, entry.error, entry.end_time = state, error, time.monotonic()
        if entry.untie is not None:
            entry.untie()
        self._tell(entry)

    def _tell(self, entry: FuseEntry) -> None:
        with self._lock:
            for watcher in entry.watchers:
                with suppress(OSError):  # full: whoever watches does not read, or has gone
                    watcher.send(b"\0")

    def _has_room(self, uid: int) -> bool:
        """Whether a user may have one more mount; the lock is held."""
        live = [entry.owner_uid for entry in self._entries.values() if not entry.state.is_final]
        nr_listed = sum(entry.owner_uid == uid for entry in self._entries.values())
        trusted = trusted_uids()
        nr_others = 0 if uid in trusted else sum(owner not in trusted for owner in live)
        is_alone = max(live.count(uid), nr_others) < _MAX_MOUNTS
        return is_alone and nr_listed < _MAX_LISTED

    def _forget_old(self) -> None:
        """Forget mounts that ended a while ago; the lock is held."""
        now = time.monotonic()
        for entry in [*self._entries.values()]:
            is_old = entry.state.is_final and now - entry.end_time > _KEPT_SECONDS
            if is_old and not entry.watchers:
                del self._entries[entry.number]
