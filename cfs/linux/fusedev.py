"""The FUSE device, fusermount3, and the kernel's list of connections.

Linux Documentation/filesystems/fuse.rst; libfuse's fusermount3(1) with ``_FUSE_COMMFD``.
No shared state: any thread may call.
"""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cfs.errors import MountError

__all__ = ["abort_connection", "fusermount", "fusermount_detach", "open_device"]

_DEVICE = "/dev/fuse"
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


def fusermount(mountpoint: str, options: Sequence[str]) -> int:
    """Mount through the setuid helper and return the device, owned by the caller.

    Args:
        mountpoint: existing directory.
        options: as for ``-o``; commas and backslashes in values are escaped by the caller.

    Raises:
        MountError: with what the helper says.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _run_helper(["-o", ",".join(options), "--", mountpoint], theirs)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
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
        raise MountError(msg) from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
        msg = text or f"{_HELPER} failed with status {done.returncode}"
        raise MountError(msg)


def abort_connection(device: int) -> None:
    """End a FUSE connection at once: whatever waits for it gets an error.

    Args:
        device: device number of its mount.

    Raises:
        OSError: the connection is gone, or not ours.
    """
    Path(f"/sys/fs/fuse/connections/{os.minor(device)}/abort").write_text("1")
