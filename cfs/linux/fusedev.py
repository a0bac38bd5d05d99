"""The FUSE device, fusermount3, and the kernel's list of connections.

Linux Documentation/filesystems/fuse.rst; libfuse's fusermount3(1) with ``_FUSE_COMMFD``.
No shared state: any thread may call.
"""

import errno
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress

from cfs.errors import MountError
from cfs.linux.sockets import receive_fds

__all__ = [
    "abort_connection",
    "clone_device",
    "fusermount",
    "fusermount_detach",
    "fusermount_unmount",
    "open_device",
    "raise_readahead",
]

_DEVICE = "/dev/fuse"
_FUSE_DEV_IOC_CLONE = 0x8004E500
_READAHEAD_KB = 1024  # as large as the largest read, max_pages of 256
_HELPER = "fusermount3"


def open_device() -> int:
    """Open a new FUSE device; the descriptor belongs to the caller.

    Raises:
        MountError: there is none, or it is not open to us.
    """
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        msg = f"cannot open {_DEVICE}: {error.strerror}"
        raise MountError(msg, error.errno or 0) from None


def clone_device(device_fd: int, nr_clones: int) -> Iterator[int]:
    """Yield new descriptors of a connection, each owned by the caller.

    They end with ``nr_clones``, or before that if this user may not open the device: one who got
    ``device_fd`` from fusermount3 has nothing but that.

    Raises:
        OSError: the kernel does not clone.
    """
    for _ in range(nr_clones):
        try:
            fd = open_device()
        except MountError:
            return
        try:
            fcntl.ioctl(fd, _FUSE_DEV_IOC_CLONE, struct.pack("I", device_fd))
        except BaseException:
            os.close(fd)
            raise
        yield fd


def raise_readahead(device: int) -> None:
    """Let the kernel read ahead as much of a mount as one request can carry, if we are allowed.

    Args:
        device: device number of the mount.
    """
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with suppress(OSError), open(path, "w") as file:
        file.write(str(_READAHEAD_KB))


def fusermount(mountpoint: str, options: Sequence[str]) -> int:
    """Mount through the setuid helper and return the device, owned by the caller.

    Args:
        mountpoint: existing directory.
        options: as for ``-o``; commas and backslashes in values are escaped by the caller.

    Raises:
        MountError: with what the helper says.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:  # ours ends with the helper then
            _run_helper(["-o", ",".join(options), "--", mountpoint], theirs)
        _, fds = receive_fds(ours, 1, 1)
    if not fds:
        msg = f"{_HELPER} gave no device for {mountpoint}"
        raise MountError(msg)
    return fds[0]


def fusermount_detach(mountpoint: str) -> None:
    """Take a FUSE mount of this user out of the tree; its users may finish.

    Raises:
        MountError: with what the helper says.
    """
    _run_helper(["-u", "-z", "--", mountpoint], None)


def fusermount_unmount(mountpoint: str) -> None:
    """Take a FUSE mount of this user out of the tree, unless it is in use.

    Raises:
        MountError: with what the helper says; ``EBUSY``: it is in use.
    """
    _run_helper(["-u", "--", mountpoint], None)


def _run_helper(args: list[str], channel: socket.socket | None) -> None:
    """Run fusermount3, and give it ``channel`` to hand the device over."""
    environment = dict(os.environ)
    fds = []
    if channel is not None:
        fds = [channel.fileno()]
        environment["_FUSE_COMMFD"] = str(channel.fileno())
    try:
        done = subprocess.run(  # noqa: S603 - no shell; the helper checks its arguments itself
            [_HELPER, *args],
            env=environment,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
    except FileNotFoundError:
        msg = f"{_HELPER} not found: expected it on PATH (Debian package fuse3)"
        raise MountError(msg, errno.EOPNOTSUPP) from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
        msg = text or f"{_HELPER} failed with status {done.returncode}"
        # it tells its reason in words only
        raise MountError(msg, errno.EBUSY if os.strerror(errno.EBUSY) in text else errno.EIO)


def abort_connection(device: int) -> None:
    """End a FUSE connection at once: whatever waits for it gets an error.

    Args:
        device: device number of its mount.

    Raises:
        OSError: the connection is gone, or not ours.
    """
    with open(f"/sys/fs/fuse/connections/{os.minor(device)}/abort", "w") as file:
        file.write("1")
