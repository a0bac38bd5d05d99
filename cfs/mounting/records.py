"""Records of the FUSE mounts that are served (spec cli-and-varlink c.4 and c.7).

A record is a file ``PID-START`` in a directory of its user, JSON, locked (flock(2), exclusive) by
all processes of its mount: while somebody holds the lock the mount is served, whatever became of
process numbers.  The server removes it at the end, and whoever lists records those that were left
behind.  What a record says is checked against the kernel's list of mounts, since mount ids and
device numbers are used again; records of other users are hostile input.

No shared state: any thread may call.
"""

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from cfs.errors import CfsError, FormatError
from cfs.fuse.choices import Mode
from cfs.linux.files import Resolve, openat2, owned
from cfs.linux.mountinfo import MountEntry, find_topmost, list_mounts
from cfs.linux.processes import is_running, start_time
from cfs.linux.traces import Trace

if TYPE_CHECKING:
    from cfs.fuse.dataplane import Statistics

__all__ = ["NewRecord", "Record", "ServedMount", "find_mounts", "new_record"]

_MODES = (Mode.PLAIN.name, Mode.OVERLAY.name)
_PLAIN_FSTYPE, _OVERLAY_FSTYPE = b"fuse.composefs", b"overlay"
_NAME = re.compile(r"[0-9]{1,10}-[0-9]{1,20}")
_SIZE_MAX = 32 * 1024
_DIRECTORY_MODE, _FILE_MODE = 0o700, 0o600
_NR_TRIES = 16
_STATE_NAME = "/memfd:cfs-state (deleted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A mount as its starter wrote it down.

    Attributes:
        mount_id: of the kernel.
        device: device number.
        mountpoint: without symlinks, as the starter saw it.
        image: as the user named it.
        mode: name of a :class:`~cfs.fuse.choices.Mode`.
        passthrough: whether the kernel was told to read objects.
        owner_uid: of the starter.
        pid: of the process that keeps the mount, the supervisor if there is one.
        start: when that started, in clock ticks since boot.
        session_pid: of the first session, 0 if unknown.
        session_start: when that started, or 0.
        started: when the mount became visible, in seconds since the epoch.
    """

    mount_id: int
    device: int
    mountpoint: str
    image: str
    mode: str
    passthrough: bool
    owner_uid: int
    pid: int
    start: int
    session_pid: int
    session_start: int
    started: int

    @classmethod
    def parse(cls, content: bytes) -> "Record":
        """Return the record that a file holds.

        Raises:
            FormatError: it holds anything else.
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        types = {field.name: field.type for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != types.keys():
            msg = "not a record of a mount"
            raise FormatError(msg)
        for name, value in values.items():
            if type(value) is not types[name] or not _is_possible(value):
                msg = f"record of a mount: {name} is {str(value)[:64]!r}"
                raise FormatError(msg)
        if values["mode"] not in _MODES:
            msg = f"record of a mount: mode is {values['mode'][:64]!r}"
            raise FormatError(msg)
        return cls(**values)

    def encode(self) -> bytes:
        """Return what the file holds."""
        return json.dumps(asdict(self)).encode()


def _is_possible(value: object) -> bool:
    """Whether a number is one of the kernel's, and a text one that its bytes can be."""
    if isinstance(value, str):
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            return False
    return not isinstance(value, int) or 0 <= value < 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedMount:
    """A mount of ours that is in the tree.

    Attributes:
        record: what its starter said of it.
        entry: what the kernel says.
        is_alive: it is served; if not, its processes were killed and it gives errors only.
    """

    record: Record
    entry: MountEntry
    is_alive: bool

    def running_pids(self) -> list[int]:
        """Return those of its processes that we know and that have not ended."""
        record = self.record
        known = ((record.pid, record.start), (record.session_pid, record.session_start))
        return [pid for pid, start in known if pid and is_running(pid, start)]

    def statistics(self) -> "Statistics | None":
        """Return what its sessions have done so far; None if that is not to be found out."""
        for pid in self.running_pids():
            with suppress(OSError, ImportError):  # gone meanwhile; the extension was not built
                return _read_statistics(pid)
        return None


class NewRecord:
    """A record that holds nothing yet; made by :func:`new_record`.

    Attributes:
        traces: for the server to hold: the locked file, and its name.
    """

    def __init__(self, directory_fd: int, fd: int, name: str) -> None:
        self.traces = (Trace(directory_fd, name), Trace(fd))
        self._fd = fd

    def write(self, record: Record) -> None:
        """Write what it shall say.

        Raises:
            OSError: as write(2).
        """
        os.pwrite(self._fd, record.encode(), 0)


@contextmanager
def new_record(directory: str, pid: int) -> Iterator[NewRecord]:
    """Make a record, empty and locked; afterwards only the server holds its descriptors.

    Args:
        directory: made if its parent is there; has to be the user's own.
        pid: of the server.

    Raises:
        OSError: the directory is not ours, or cannot be written; the server has gone.
    """
    start = start_time(pid)
    if start is None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    with suppress(FileExistsError):
        os.mkdir(directory, _DIRECTORY_MODE)
    with ExitStack() as stack:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory_fd = owned(stack, os.open(directory, flags))
        if os.fstat(directory_fd).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), directory)
        name = f"{pid}-{start}"
        yield NewRecord(directory_fd, owned(stack, _create_locked(directory_fd, name)), name)


def _create_locked(directory_fd: int, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_NR_TRIES):
        fd = os.open(name, flags, _FILE_MODE, dir_fd=directory_fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # those who list hold it for moments
            if os.fstat(fd).st_nlink:  # else somebody took it for a leftover before we had it
                os.ftruncate(fd, 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def find_mounts(directories: Sequence[str]) -> list[ServedMount]:
    """Return the mounts that have a record and are in the tree, oldest first.

    Removes records that nobody holds, of mounts that are not there.

    Args:
        directories: where users keep records; a missing one holds none.

    Raises:
        OSError: there is no /proc.
    """
    entries = list_mounts()
    found = (mount for directory in directories for mount in _find_in(directory, entries))
    # a mount that follows one that has ended may have its place and all its numbers, while the
    # other's processes are about to end
    by_entry = {mount.entry.mount_id: mount for mount in sorted(found, key=_likelihood)}
    return sorted(by_entry.values(), key=lambda it: (it.record.started, it.record.mount_id))


def _likelihood(mount: ServedMount) -> tuple[bool, bool, int]:
    """Of two records that claim one mount, the right one has the greater."""
    record = mount.record
    return mount.is_alive, record.mount_id == mount.entry.mount_id, record.start


def _find_in(directory: str, entries: Sequence[MountEntry]) -> Iterator[ServedMount]:
    parent, _, name = directory.rpartition("/")
    place = find_topmost(entries, os.fsencode(parent))
    if place is not None and place.fstype.startswith(b"fuse"):
        return  # its owner may let us wait for ever
    with ExitStack() as stack:
        try:
            parent_fd = owned(stack, os.open(parent or "/", os.O_PATH | os.O_DIRECTORY))
            resolve = Resolve.BENEATH | Resolve.NO_SYMLINKS
            if os.fstat(parent_fd).st_uid != os.geteuid():
                resolve |= Resolve.NO_XDEV  # the same
            flags = os.O_RDONLY | os.O_DIRECTORY
            fd = owned(stack, openat2(parent_fd, os.fsencode(name), flags, resolve=resolve))
            names = sorted(filter(_NAME.fullmatch, os.listdir(fd)))
            owner = os.fstat(fd).st_uid
        except OSError:
            return
        for record_name in names:
            with suppress(OSError, CfsError):
                mount = _check_record(fd, record_name, owner, entries)
                if mount is not None:
                    yield mount


def _check_record(
    directory_fd: int, name: str, owner: int, entries: Sequence[MountEntry]
) -> ServedMount | None:
    """Return the mount of a record, if it is there; if not and nobody holds it, remove it."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
    with ExitStack() as stack:
        fd = owned(stack, os.open(name, flags, dir_fd=directory_fd))
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != owner:
            return None
        is_alive = _is_locked(fd)
        record = entry = None
        with suppress(FormatError):
            record = Record.parse(os.pread(fd, _SIZE_MAX, 0))
            entry = _find_entry(record, owner, entries, is_alive=is_alive)
        if record is not None and entry is not None and record.owner_uid == owner:
            return ServedMount(record=record, entry=entry, is_alive=is_alive)
        if not is_alive:
            os.unlink(name, dir_fd=directory_fd)
        return None


def _is_locked(fd: int) -> bool:
    """Whether the processes of a mount hold the lock of its record; else we do from now on."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _find_entry(
    record: Record, owner: int, entries: Sequence[MountEntry], *, is_alive: bool
) -> MountEntry | None:
    """Find the mount of a record.

    A copy of it counts as well: in another mount name space all mounts have other ids.  While it
    is served its device number is nobody else's, so then a copy at another place counts too.
    """
    same = [entry for entry in entries if entry.device == record.device and _is_of(entry, owner)]
    mountpoint = os.fsencode(record.mountpoint)
    ids = [entry for entry in same if entry.mount_id == record.mount_id]
    places = [entry for entry in same if entry.mountpoint == mountpoint]
    return next(iter([*ids, *reversed(places), *(same if is_alive else [])]), None)


def _is_of(entry: MountEntry, owner: int) -> bool:
    """Whether a mount can be one of a user's records.

    The kernel tells who made a FUSE mount, but not who made an overlay: only we ourselves can
    have made one of ours.
    """
    if not entry.source.startswith(b"composefs:"):
        return False
    if entry.fstype == _PLAIN_FSTYPE:
        return b"user_id=%d" % owner in entry.options.split(b",")
    return entry.fstype == _OVERLAY_FSTYPE and owner == os.geteuid()


def _read_statistics(pid: int) -> "Statistics | None":
    """Read the state of a mount that a process holds, the supervisor or the session."""
    from cfs.fuse.dataplane import read_statistics  # noqa: PLC0415 - loads the extension

    with ExitStack() as stack:
        ours = owned(stack, os.memfd_create("cfs-ps", os.MFD_CLOEXEC))
        memfd_mount = _mount_of_descriptor(os.getpid(), str(ours))
        for number in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{number}"
            # a name alone could be that of a file which blocks whoever opens it
            if os.readlink(path) == _STATE_NAME and (
                _mount_of_descriptor(pid, number) == memfd_mount
            ):
                # not to wait either if it has become another one since
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                fd = owned(stack, os.open(path, flags))
                statistics = read_statistics(fd)
                return statistics if statistics.sessions else None
    return None


def _mount_of_descriptor(pid: int, number: str) -> str | None:
    with open(f"/proc/{pid}/fdinfo/{number}") as lines:
        return next((line for line in lines if line.startswith("mnt_id:")), None)
