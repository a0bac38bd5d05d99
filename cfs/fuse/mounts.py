"""A mount that serves, as its starter sees it.

Runs in the command or the service; imports neither pyfuse3 nor trio.  A ``Mount`` belongs to the
thread that started it.
"""

import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cfs.errors import MountError, UnsupportedError
from cfs.fuse.handover import last_word
from cfs.linux.fusedev import abort_connection
from cfs.linux.mountinfo import mounted_at
from cfs.mount import detach, is_dead

if TYPE_CHECKING:
    from cfs.fuse.dataplane import Statistics

__all__ = ["GRACE_SECONDS", "Mount", "Process"]

GRACE_SECONDS = 1.0
_ABORT_SECONDS = 2.0


class Process(Protocol):
    """What of :class:`subprocess.Popen` a mount uses."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the status if it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the status."""

    def kill(self) -> None:
        """Kill it."""


class Mount:
    """A mount that serves, and its supervisor.

    The mount is taken down when its starter goes, however that ends, unless :meth:`leave` was
    called.

    Args:
        mountpoint: without symlinks.
        device: device number.
        process: the supervisor, or without one the session.
        channel: to it; owned by the mount.
        state_fd: memfd of the statistics, owned by the mount; -1 without workers.
        tree_fd: descriptor of a mount without a place, owned by the mount; else -1.

    Attributes:
        mountpoint: without symlinks; empty if there is none.
        device: device number, ``st_dev`` of everything in it.
        pid: of the supervisor, or without one of the session; a child of this process.
    """

    def __init__(
        self,
        mountpoint: str,
        device: int,
        process: Process,
        channel: socket.socket,
        state_fd: int,
        *,
        tree_fd: int = -1,
    ) -> None:
        self.mountpoint = mountpoint
        self.device = device
        self.pid = process.pid
        self._tree_fd = tree_fd
        self._process = process
        self._channel = channel
        self._state_fd = state_fd
        self._statistics: Statistics | None = None
        self._is_over = False

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the mount has ended; return the status of its process, 0 after any unmount.

        If the process was killed, the mount is taken out of the tree.

        Raises:
            TimeoutError: it still serves after ``timeout`` seconds.
            MountError: it cannot be unmounted.
        """
        if self._process.poll() is None:
            with _pidfd(self.pid) as process:
                if not _has_ended(process, timeout):
                    msg = f"{self.mountpoint} still serves after {timeout} s"
                    raise TimeoutError(msg)
        status = self._process.wait()
        self._close()
        # device numbers are used again soon: what is there now may be somebody else's
        if status and not self._is_over and (self._has_orphan or self._is_left()):
            detach(self.mountpoint, self.device)
        self._is_over = True
        return status

    def statistics(self) -> "Statistics":
        """Return what the sessions of the mount have done so far, or did until it ended.

        Raises:
            UnsupportedError: there are no workers, or the mount was left.
        """
        if self._state_fd >= 0:
            from cfs.fuse.dataplane import read_statistics  # noqa: PLC0415 - workers=0 needs none

            return read_statistics(self._state_fd)
        if self._statistics is None:
            msg = "a mount without workers keeps no statistics"
            raise UnsupportedError(msg)
        return self._statistics

    def unmount(self, grace: float = GRACE_SECONDS) -> None:
        """Take the mount out of the tree at once, and end its processes.

        Idempotent; does nothing more when the mount was unmounted from outside.

        Args:
            grace: seconds that those who still use it have; then they get errors.

        Raises:
            MountError: it cannot be unmounted.
        """
        if self._process.poll() is None:
            detach(self.mountpoint, self.device)
        try:
            self.wait(grace)
        except TimeoutError:
            self._abort()
        if self._has_orphan:
            self._end_orphan(grace)

    def take_tree(self) -> int:
        """Return the descriptor of a mount without a place, the caller's from now on; else -1."""
        tree_fd, self._tree_fd = self._tree_fd, -1
        return tree_fd

    def end(self) -> None:
        """Tell its process to take the mount down and end, after the grace period; do not wait.

        Works although others hold copies of our end of the channel.
        """
        with suppress(OSError):  # it has ended already
            self._channel.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close our descriptors, without waiting; idempotent.

        The mount ends with the last copy of our end of the channel, unless it was left.
        """
        self._close()

    def descriptors(self) -> dict[str, int]:
        """Return what another process needs to go on in our place; borrowed."""
        return {"channel": self._channel.fileno(), "state": self._state_fd}

    def last_words(self) -> str:
        """Return why its process ended by itself, as far as it said; empty else.

        To be asked before :meth:`wait`, which closes the channel.
        """
        words = last_word(self._channel)
        return words.removeprefix("failed: ") if words.startswith("failed: ") else ""

    def _abort(self) -> None:
        """End the connection: by its process if that still listens, else by the kernel."""
        with suppress(OSError):
            self._channel.send(b"end")
        try:
            self.wait(_ABORT_SECONDS)
        except TimeoutError:
            with suppress(OSError):  # fusectl is not mounted everywhere
                abort_connection(self.device)
            self._process.kill()
            self.wait()

    def _is_left(self) -> bool:
        """Whether it is still in the tree, dead; what lies upon it could let us wait for ever."""
        return mounted_at(self.mountpoint) == self.device and is_dead(self.mountpoint)

    @property
    def _has_orphan(self) -> bool:
        """Whether a supervisor was killed, so that its session may serve on."""
        return (
            (self._process.returncode or 0) < 0
            and self._statistics is not None
            and self._statistics.session_pid != self.pid
        )

    def _end_orphan(self, grace: float) -> None:
        """End the session that outlived its supervisor, when its users had their time."""
        assert self._statistics is not None
        pid = self._statistics.session_pid
        with suppress(ProcessLookupError, FileNotFoundError), _pidfd(pid) as session:
            # while the descriptor is open the number cannot come to mean another process
            if b"cfs.fuse.session" in Path(f"/proc/{pid}/cmdline").read_bytes():
                if not _has_ended(session, grace):
                    signal.pidfd_send_signal(session, signal.SIGKILL)
                _has_ended(session, _ABORT_SECONDS)

    def leave(self) -> None:
        """Let the mount serve on when this process ends.

        Raises:
            MountError: its process has ended.
        """
        try:
            self._channel.send(b"stay")
        except OSError:
            msg = f"{self.mountpoint}: the server ended at once"
            raise MountError(msg) from None
        self._close()

    def _close(self) -> None:
        """Close our descriptors; the last statistics are kept."""
        self._channel.close()
        if self._tree_fd >= 0:
            os.close(self.take_tree())
        if self._state_fd >= 0:
            self._statistics = self.statistics()
            os.close(self._state_fd)
        self._state_fd = -1


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _has_ended(pidfd: int, seconds: float | None) -> bool:
    """Wait for the end of a process, at most so long."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
