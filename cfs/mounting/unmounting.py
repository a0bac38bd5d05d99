"""End FUSE mounts of ours, and no others (spec cli-and-varlink c.4).  No shared state."""

import os
import select
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from cfs.errors import MountError, NotFoundError
from cfs.linux.fusedev import fusermount_unmount
from cfs.linux.mountinfo import find_topmost, list_mounts
from cfs.linux.mounts import unmount as unmount_path
from cfs.mount import detach
from cfs.mounting.records import ServedMount

__all__ = ["select_mount", "unmount"]

_END_SECONDS = 10


def select_mount(mounts: Iterable[ServedMount], path: str) -> ServedMount:
    """Return the mount at a path, the topmost there.

    Asks the mount itself nothing if the path names its place without symlinks, so a dead one is
    found as well.

    Raises:
        NotFoundError: none of them is there.
    """
    candidates = [*mounts]
    for place in _places(path):
        found = [mount for mount in candidates if mount.entry.mountpoint == place]
        if found:
            return _topmost(found, place, path)
    msg = f"{path}: not a FUSE mount of cfs"
    raise NotFoundError(msg)


def _places(path: str) -> Iterator[bytes]:
    """Yield what a path may mean: first as if its last name were no symlink."""
    parent, name = os.path.split(path.rstrip("/"))
    if name not in ("", ".", ".."):
        yield os.fsencode(os.path.join(os.path.realpath(parent or "."), name))
    if path:
        yield os.fsencode(os.path.realpath(path))


def _topmost(mounts: Iterable[ServedMount], place: bytes, path: str) -> ServedMount:
    topmost = find_topmost(list_mounts(), place)
    for mount in mounts:
        if mount.entry == topmost:
            return mount
    msg = f"{path}: another mount lies above that of cfs"
    raise NotFoundError(msg)


def unmount(mount: ServedMount, *, lazy: bool = False) -> None:
    """Take a mount out of the tree, and wait until its server has ended if no copy is left.

    Args:
        mount: the topmost at its place.
        lazy: take it out although it is in use; those who use it may finish, nobody waits.

    Raises:
        MountError: it is in use, or neither the kernel nor fusermount3 lets us.
    """
    mountpoint = os.fsdecode(mount.entry.mountpoint)
    if lazy:
        detach(mountpoint, mount.entry.device)
        return
    try:
        unmount_path(mountpoint, mount.entry.device)
    except PermissionError:
        fusermount_unmount(mountpoint)
    except OSError as error:
        msg = f"cannot unmount {mountpoint}: {error.strerror}"
        raise MountError(msg, error.errno or 0) from None
    if any(entry.device == mount.entry.device for entry in list_mounts()):
        return
    deadline = time.monotonic() + _END_SECONDS
    for pid in mount.running_pids():
        _wait_for_end(pid, deadline)


def _wait_for_end(pid: int, deadline: float) -> None:
    """Wait for the end of a server, so that its traces are gone; not for ever."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        finally:
            os.close(pidfd)
