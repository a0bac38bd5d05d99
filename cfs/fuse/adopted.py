"""The process of a mount that another process started, and that is ours to look after now.

No shared state: whoever adopts it uses it.
"""

import select
import signal
import socket
from contextlib import suppress

from cfs.fuse.handover import channel_pair, last_word
from cfs.fuse.mounts import Mount

__all__ = ["AdoptedProcess", "clear_away"]


class AdoptedProcess:
    """A supervisor that is no child of ours, used as ``subprocess.Popen`` is.

    Args:
        pid: its number.
        pidfd: of it; borrowed, open as long as this is used.  -1: it has ended.
        channel: to it; borrowed.

    Attributes:
        pid: its number.
        returncode: None while it runs; as it is not our child, what it said at last counts: 0 if
            all was well, else -SIGKILL.
    """

    def __init__(self, pid: int, pidfd: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._channel = channel

    def poll(self) -> int | None:
        """Return the status if it has ended."""
        if self.returncode is None and self._has_ended(0):
            is_well = last_word(self._channel) == "ended"
            self.returncode = 0 if is_well else -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the status.

        Raises:
            TimeoutError: it still runs.
        """
        if not self._has_ended(timeout):
            msg = f"process {self.pid} still runs"
            raise TimeoutError(msg)
        status = self.poll()
        assert status is not None
        return status

    def kill(self) -> None:
        """Kill it."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _has_ended(self, seconds: float | None) -> bool:
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))


def clear_away(mountpoint: str, device: int, pid: int, state_fd: int) -> None:
    """Take away what a supervisor left that died unseen: a dead mount, a session of its own.

    Args:
        mountpoint: without symlinks.
        device: device number.
        pid: of the supervisor.
        state_fd: memfd of the statistics, ours from now on, or -1.

    Raises:
        MountError: it cannot be unmounted.
    """
    channel, theirs = channel_pair()
    theirs.close()
    Mount(mountpoint, device, AdoptedProcess(pid, -1, channel), channel, state_fd).unmount()
