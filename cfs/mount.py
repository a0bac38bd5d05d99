"""Make and end mounts: check the mount point, choose how, clean up.

A privileged caller gets a detached mount that appears at the mount point when it serves; others
mount in place through fusermount3.  No shared state: any thread may call.
"""

import errno
import os
import stat
import time
from typing import NamedTuple

from cfs.errors import MountError, MountPointError
from cfs.linux.fusedev import fusermount, fusermount_detach, open_device
from cfs.linux.mountinfo import mounted_at
from cfs.linux.mounts import (
    MountAttr,
    attach_mount,
    attach_mount_to,
    create_mount,
    detach_mount,
    mount_device,
)

__all__ = [
    "FuseMount",
    "Place",
    "create_detached",
    "detach",
    "is_dead",
    "mount_source",
    "prepare_mountpoint",
]

_SUBTYPE = "composefs"
_SOURCE_MAX = 255  # bytes of a string that fsconfig takes
_MAX_STALE = 16


class Place(NamedTuple):
    """Where a mount goes, and whose it is.

    Attributes:
        path: from :func:`prepare_mountpoint`; empty: nowhere, its descriptor is handed on.
        directory_fd: that directory, opened with another user's rights; borrowed.  -1: found by
            its path.
        owner: user and group id of the user who gets in; None: our own.
    """

    path: str
    directory_fd: int = -1
    owner: tuple[int, int] | None = None


def prepare_mountpoint(path: str) -> str:
    """Return the mount point without symlinks, an existing directory.

    Dead FUSE mounts on it, whose server is gone, are taken away.

    Raises:
        MountPointError: it is no directory that we can use.
    """
    if not path:  # realpath would make the working directory of it
        msg = "mount point is empty: expected a directory"
        raise MountPointError(msg, errno.ENOENT)
    resolved = os.path.realpath(path)
    for _ in range(_MAX_STALE):
        if is_dead(resolved):
            detach(resolved)
            continue
        try:
            status = os.stat(resolved)
        except OSError as error:
            msg = f"mount point {path}: {error.strerror}"
            raise MountPointError(msg, error.errno or errno.EIO) from None
        if stat.S_ISDIR(status.st_mode):
            return resolved
        msg = f"mount point {path}: not a directory"
        raise MountPointError(msg, errno.ENOTDIR)
    msg = f"mount point {path}: more than {_MAX_STALE} dead mounts"
    raise MountPointError(msg, errno.ENOTCONN)


def is_dead(path: str) -> bool:
    """Whether a path is a FUSE mount whose server has gone."""
    try:
        os.statvfs(path)  # a dead mount may still know its root, but never this
        # an overlay asks its upper directory; of a name that is new it asks all layers
        os.lstat(f"{path}/.cfs-{os.getpid()}-{time.monotonic_ns()}")
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def detach(mountpoint: str, device: int | None = None) -> None:
    """Take a FUSE mount out of the tree at once; those who use it may finish.

    Args:
        mountpoint: without symlinks.
        device: do nothing if the topmost mount there has another device number.

    Raises:
        MountError: neither the kernel nor fusermount3 lets us.
    """
    if device is not None and mounted_at(mountpoint) != device:
        return
    try:
        _detach_topmost(mountpoint, device)
    except MountError:
        # starter and supervisor may be told to end at once: one of them is faster
        if device is None or mounted_at(mountpoint) == device:
            raise


def _detach_topmost(mountpoint: str, device: int | None) -> None:
    try:
        detach_mount(mountpoint, device)
    except PermissionError:
        fusermount_detach(mountpoint)
    except OSError as error:
        msg = f"cannot unmount {mountpoint}: {error.strerror}"
        raise MountError(msg, error.errno or errno.EIO) from None


class FuseMount:
    """A new FUSE file system, read-only, that nobody serves yet.

    Hand its device to who serves it, :meth:`release_device`, then either :meth:`attach` it or
    :meth:`discard` it, and :meth:`close`.

    Args:
        place: where.
        name: shown as source, ``composefs:NAME``.
        allow_other: let other users in.
        attributes: of the mount, besides those that it always has.

    Attributes:
        device_fd: the FUSE device to serve.
        device: device number of a mount made in place, which is visible already; else None.

    Raises:
        MountError: the kernel or fusermount3 refused.
    """

    device: int | None = None

    def __init__(
        self,
        place: Place,
        name: str,
        *,
        allow_other: bool,
        attributes: MountAttr = MountAttr.NONE,
    ) -> None:
        self._place = place
        self._mount_fd = -1
        try:
            device_fd = open_device()
        except MountError:
            if os.geteuid() == 0:
                raise
            device_fd = -1  # the helper may be allowed what we are not
        source = mount_source(name)
        if device_fd >= 0:
            try:
                self._mount_fd = create_detached(
                    device_fd,
                    source,
                    allow_other=allow_other,
                    attributes=attributes,
                    owner=place.owner,
                )
            except MountError as error:
                os.close(device_fd)
                if error.errno != errno.EPERM or os.geteuid() == 0:
                    raise
        if self._mount_fd < 0:
            if not place.path:
                msg = "a mount without a mount point needs the right to mount (CAP_SYS_ADMIN)"
                raise MountError(msg, errno.EPERM)
            device_fd = _mount_in_place(
                place.path, source, allow_other=allow_other, attributes=attributes
            )
            self.device = mounted_at(place.path)
        self.device_fd = device_fd

    def release_device(self) -> None:
        """Close our descriptor of the device: with its server the file system then ends too."""
        if self.device_fd >= 0:
            os.close(self.device_fd)
        self.device_fd = -1

    def attach(self) -> int:
        """Show the mount, which serves by now, if it has a place; return its device number.

        Its root is looked at, unless it is another user's: he could have us wait for ever.

        Raises:
            MountPointError: the place is gone or not ours, or nobody serves any more.
        """
        place = self._place
        try:
            if place.owner is None:
                os.stat(place.path if self._mount_fd < 0 else self._mount_fd)
            if not place.path:
                return mount_device(self._mount_fd)
            if place.directory_fd >= 0 and self._mount_fd >= 0:
                attach_mount_to(self._mount_fd, place.directory_fd)
                return mount_device(self._mount_fd)
            if self._mount_fd >= 0:
                attach_mount(self._mount_fd, place.path)
            device = mounted_at(place.path)
        except OSError as error:
            msg = f"cannot mount on {place.path}: {error.strerror}"
            raise MountPointError(msg, error.errno or errno.EIO) from None
        if device is None:
            msg = f"cannot mount on {place.path}: it was unmounted at once"
            raise MountPointError(msg)
        return device

    def take_detached(self) -> int:
        """Return the descriptor of a mount without a place, the caller's from now on; else -1."""
        if self._place.path:
            return -1
        mount_fd, self._mount_fd = self._mount_fd, -1
        return mount_fd

    def discard(self) -> None:
        """Take back a mount that was made in place."""
        if self.device is not None:
            detach(self._place.path, self.device)

    def close(self) -> None:
        """Close our descriptors; a mount that was not attached is gone then."""
        self.release_device()
        if self._mount_fd >= 0:
            os.close(self._mount_fd)
        self._mount_fd = -1


def mount_source(name: str) -> bytes:
    """Return the mount source; of a very long name the end."""
    room = _SOURCE_MAX - len(b"composefs:")
    return b"composefs:" + os.fsencode(name)[-room:]


def create_detached(
    device_fd: int,
    source: bytes,
    *,
    allow_other: bool,
    attributes: MountAttr = MountAttr.NONE,
    owner: tuple[int, int] | None = None,
) -> int:
    """Make a FUSE file system that is in no tree yet; return the descriptor of its mount.

    Raises:
        MountError: the kernel refused; EPERM: we have not the right to mount.
    """
    uid, gid = owner or (os.geteuid(), os.getegid())
    options: list[tuple[str, str | bytes | None]] = [
        ("source", source),
        ("subtype", _SUBTYPE),
        ("fd", str(device_fd)),
        ("rootmode", f"{stat.S_IFDIR:o}"),
        ("user_id", str(uid)),
        ("group_id", str(gid)),
        ("default_permissions", None),
        ("ro", None),
    ]
    if allow_other:
        options.append(("allow_other", None))
    attributes |= MountAttr.RDONLY
    if owner is not None or os.geteuid() != 0:
        attributes |= MountAttr.NOSUID | MountAttr.NODEV
    return create_mount("fuse", options, attributes)


def _mount_in_place(
    mountpoint: str, source: bytes, *, allow_other: bool, attributes: MountAttr
) -> int:
    escaped = os.fsdecode(source).replace("\\", "\\\\").replace(",", "\\,")
    options = ["ro", "nosuid", "nodev", "default_permissions"]
    options += [f"fsname={escaped}", f"subtype={_SUBTYPE}"]
    if allow_other:
        options.append("allow_other")
    if attributes & MountAttr.NOEXEC:
        options.append("noexec")
    return fusermount(mountpoint, options)
