"""The data plane in this process: typed border to the worker (``worker/worker.h``).

The threads of the worker answer the FUSE device without the interpreter; Python creates them,
waits for news on :attr:`DataPlane.event_fd`, and ends them.  Layouts of structures come from the
headers, through ``ffi``.  A ``DataPlane`` belongs to one thread of Python; the statistics in the
state memfd may be read by any process at any time.  Imports neither numpy nor pyfuse3.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Protocol, cast

from cfs.errors import MountError
from cfs.fuse import _worker  # made by _build.py
from cfs.fuse.choices import Passthrough, Verify

__all__ = [
    "DataPlane",
    "Event",
    "LogEntry",
    "LogReason",
    "Opcode",
    "Statistics",
    "read_statistics",
]


class _Library(Protocol):
    """The functions of ``worker.h``; codes are 0 or ``-errno``."""

    # config, why, why_size; the worker or NULL
    cfs_worker_create: Callable[[object, object, int], object]
    cfs_worker_start: Callable[[object], int]
    cfs_worker_events: Callable[[object], int]
    cfs_worker_failure: Callable[[object], object]
    # worker, entry
    cfs_worker_next_log: Callable[[object, object], int]
    cfs_worker_end_pushes: Callable[[object], None]
    cfs_worker_stop: Callable[[object], None]
    cfs_worker_destroy: Callable[[object], None]


class _Ffi(Protocol):
    """What is used of cffi's ``FFI``; structures are ``Any``, their fields are those of C."""

    NULL: object

    def new(self, cdecl: str, init: object = None, /) -> Any: ...
    def string(self, cdata: object, /) -> bytes: ...
    def sizeof(self, cdecl: str, /) -> int: ...
    def buffer(self, cdata: object, /) -> Any: ...


_lib = cast("_Library", _worker.lib)
_ffi = cast("_Ffi", _worker.ffi)
_ADAPTIVE = 0xFFFFFFFF
_HAS_RESEND = 1 << 39  # INIT flag
_REASON_SIZE = 256


class Event(IntFlag):
    """``enum cfs_event``."""

    SERVING = 1
    ENDED = 2
    LOG = 4
    FAILED = 8


class LogReason(IntEnum):
    """``enum cfs_log_reason``."""

    NO_OBJECT = 0
    OPEN = 1
    SIZE = 2
    SHORT = 3
    DIGEST = 4
    NO_DIGEST = 5
    NO_VERITY = 6


class Opcode(IntEnum):
    """``enum fuse_opcode`` of Linux, include/uapi/linux/fuse.h; OTHER counts all else."""

    OTHER = 0
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


class LogEntry(NamedTuple):
    """A file that could not be served, told once for each inode (``struct cfs_log_entry``)."""

    reason: LogReason
    nid: int
    object: bytes
    error: int
    value: int


class Statistics(NamedTuple):
    """What the sessions of a mount have done so far (``struct cfs_state``).

    Attributes:
        sessions: started so far.
        session_pid: of the one that runs, or ran last.
        is_negotiated: INIT was answered; then the next three hold.
        minor: of the FUSE protocol.
        flags: INIT flags in use, 64 bits.
        use_passthrough: external files are read by the kernel.
        requests: count for each opcode that was seen.
        counters: all others by their names in ``struct cfs_counters``.
    """

    sessions: int
    session_pid: int
    is_negotiated: bool
    minor: int
    flags: int
    use_passthrough: bool
    requests: dict[str, int]
    counters: dict[str, int]

    @property
    def can_resend(self) -> bool:
        """Whether the kernel gives unanswered requests of a dead session to the next one."""
        return bool(self.flags & _HAS_RESEND)


def read_statistics(state_fd: int) -> Statistics:
    """Read the statistics from a state memfd; all zero if no session was there yet.

    Args:
        state_fd: borrowed; its position is neither used nor moved.
    """
    state = _ffi.new("struct cfs_state *")
    content = os.pread(state_fd, _ffi.sizeof("struct cfs_state"), 0)
    _ffi.buffer(state)[: len(content)] = content
    counters = state.counters
    return Statistics(
        sessions=state.nr_sessions,
        session_pid=state.session_pid,
        is_negotiated=bool(state.is_negotiated),
        minor=state.minor,
        flags=state.flags,
        use_passthrough=bool(state.use_passthrough),
        requests=_requests(counters.requests),
        counters={name: getattr(counters, name) for name in dir(counters) if name != "requests"},
    )


def _requests(counts: Sequence[int]) -> dict[str, int]:
    names = {opcode.value: opcode.name.lower() for opcode in Opcode}
    return {
        names.get(number, f"opcode_{number}"): count for number, count in enumerate(counts) if count
    }


class DataPlane:
    """Worker threads on the descriptors of one mount.

    All descriptors are borrowed and must outlive it.  Call :meth:`close` at the end.

    Args:
        table: sealed memfd of :func:`cfs.fuse.shared.publish`.
        state: memfd that survives sessions, empty before the first.
        relay: ``SOCK_SEQPACKET`` to pyfuse3, or -1: what is not hot gets ENOSYS.
        devices: non-blocking; the mount's device and clones of it, one for each thread.
        objects: objects directories, searched in this order.
        masked_flags: INIT flags (64 bits) not to use, for tests.
        passthrough: :class:`~cfs.fuse.options.Passthrough`: shall the kernel read objects itself?
        stack_depth: with passthrough 1, or 2 if the objects lie on a stacked file system.
        verify: :class:`~cfs.fuse.options.Verify`: which digest of an object counts.
        is_metadata_only: overlay mode, contents of objects are not served.
        max_poll_us: 0 to never poll the device, None for the default.
        max_object_fds: bound on open objects, 0 for a default that fits ``RLIMIT_NOFILE``.

    Attributes:
        event_fd: readable when :meth:`events` has news.

    Raises:
        MountError: with the reason.
    """

    def __init__(
        self,
        *,
        table: int,
        state: int,
        relay: int,
        devices: Sequence[int],
        objects: Sequence[int],
        masked_flags: int = 0,
        passthrough: int = Passthrough.OFF,
        stack_depth: int = 1,
        verify: int = Verify.OFF,
        is_metadata_only: bool = False,
        max_poll_us: int | None = None,
        max_object_fds: int = 0,
    ) -> None:
        self._worker = _ffi.NULL
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        config = _ffi.new("struct cfs_config *")
        device_fds = _ffi.new("int32_t[]", list(devices))
        object_dirs = _ffi.new("int32_t[]", list(objects))
        config.table_fd, config.state_fd, config.relay_fd = table, state, relay
        config.event_fd = self.event_fd
        config.nr_devices, config.device_fds = len(devices), device_fds
        config.nr_object_dirs, config.object_dirs = len(objects), object_dirs
        config.masked_flags = masked_flags
        config.passthrough, config.stack_depth = passthrough, stack_depth
        config.verify, config.is_metadata_only = verify, is_metadata_only
        config.max_poll_us = _ADAPTIVE if max_poll_us is None else max_poll_us
        config.max_object_fds = max_object_fds
        why = _ffi.new("char[]", _REASON_SIZE)
        self._worker = _lib.cfs_worker_create(config, why, _REASON_SIZE)
        if self._worker == _ffi.NULL:
            self.close()
            raise MountError(_text(why))

    def start(self) -> None:
        """Start to serve.

        Raises:
            MountError: the system has no more threads, or refused the relay.
        """
        result = _lib.cfs_worker_start(self._worker)
        if result < 0:
            msg = f"cannot start the data plane: {os.strerror(-result)}"
            raise MountError(msg, -result)

    def events(self) -> Event:
        """Return what happened since the last call; never waits."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.event_fd)
        return Event(_lib.cfs_worker_events(self._worker))

    def failure(self) -> str:
        """Return the reason of ``Event.FAILED``, or an empty text."""
        return _text(_lib.cfs_worker_failure(self._worker))

    def log_entries(self) -> Iterator[LogEntry]:
        """Take out and yield what is to be logged."""
        entry = _ffi.new("struct cfs_log_entry *")
        while _lib.cfs_worker_next_log(self._worker, entry):
            yield LogEntry(
                LogReason(entry.reason),
                entry.nid,
                _ffi.string(entry.object),
                entry.error,
                entry.value,
            )

    def end_pushes(self) -> None:
        """Push no contents of files from now on: nobody follows if this session is killed."""
        _lib.cfs_worker_end_pushes(self._worker)

    def stop(self) -> None:
        """End all threads and wait for them; requests that come now wait for a next session."""
        _lib.cfs_worker_stop(self._worker)

    def close(self) -> None:
        """Stop, and free everything; idempotent."""
        if self._worker != _ffi.NULL:
            _lib.cfs_worker_stop(self._worker)
            _lib.cfs_worker_destroy(self._worker)
            self._worker = _ffi.NULL
        if self.event_fd >= 0:
            os.close(self.event_fd)
            self.event_fd = -1


def _text(chars: object) -> str:
    return _ffi.string(chars).decode(errors="replace")
