"""The mount calls that Python lacks.

Linux man pages fsopen(2), fsconfig(2), fsmount(2), move_mount(2), mount_setattr(2), umount(2);
Linux 5.2 or later.  Mount points are paths without symlinks: who may rename directories on the
way must not be able to lead us elsewhere.  No shared state: any thread may call.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import IntFlag

from cfs.errors import MountError
from cfs.linux.files import Resolve, openat2
from cfs.linux.kmsg import KernelLog
from cfs.linux.libc import libc

__all__ = [
    "MountAttr",
    "Option",
    "attach_mount",
    "attach_mount_to",
    "create_mount",
    "detach_mount",
    "is_initial_user_namespace",
    "map_ids",
    "mount_device",
    "unmount",
]

Option = tuple[str, str | bytes | int | None]

# numbers that all architectures share
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_SET_FLAG, _SET_STRING, _SET_FD, _CMD_CREATE = 0, 1, 5, 6  # enum fsconfig_command
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_STATX_SIZE = 256
_STATX_DEVICE = struct.Struct("=136xII")  # stx_dev_major, stx_dev_minor
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_LOG_SIZE = 4096
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO
_MOUNT_ATTR = struct.Struct("=QQQQ")  # attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR_IDMAP = 0x100000


class MountAttr(IntFlag):
    """``MOUNT_ATTR_*`` of fsmount."""

    NONE = 0
    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOATIME = 0x10
    STRICTATIME = 0x20
    NODIRATIME = 0x80
    NOSYMFOLLOW = 0x200000


def _syscall(number: int, *args: int | bytes | None) -> int:
    """Call with integers and texts; ``OSError`` without a name on failure."""
    typed = [ctypes.c_char_p(a) if a is None or isinstance(a, bytes) else ctypes.c_long(a)
             for a in args]  # fmt: skip
    result = int(libc().syscall(ctypes.c_long(number), *typed))
    if result < 0:
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))
    return result


def create_mount(
    fstype: str,
    options: Sequence[Option],
    attributes: MountAttr,
    *,
    optional: Collection[str] = (),
) -> int:
    """Make a file system and a mount of it that is attached nowhere yet.

    Args:
        fstype: type, without subtype.
        options: keys and values, in this order; a number is a descriptor, a flag has value None.
        attributes: of the mount.
        optional: keys to leave out if the kernel does not know them.

    Returns:
        Descriptor of the mount, owned by the caller.  The mount ends with it, unless
        :func:`attach_mount` gives it a place.

    Raises:
        MountError: with the text that the kernel left in the file system context or in its log.
    """
    context = -1
    with KernelLog() as log:
        try:
            context = _syscall(_SYS_FSOPEN, fstype.encode(), _CLOEXEC)
            for key, value in options:
                _configure(context, key.encode(), value, is_optional=key in optional)
            _syscall(_SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0)
            return _syscall(_SYS_FSMOUNT, context, _CLOEXEC, attributes)
        except OSError as error:
            reason = error.errno or errno.EIO
            cause = _read_messages(context) or log.read(fstype) or error.strerror
            if context < 0 and reason == errno.ENODEV:
                cause = "the kernel does not know it"
            msg = f"cannot make a mount of type {fstype}: {cause}"
            raise MountError(msg, reason) from None
        finally:
            if context >= 0:
                os.close(context)


def _configure(
    context: int, key: bytes, value: str | bytes | int | None, *, is_optional: bool
) -> None:
    try:
        if isinstance(value, int):
            _syscall(_SYS_FSCONFIG, context, _SET_FD, key, None, value)
            return
        text = value.encode() if isinstance(value, str) else value
        command = _SET_FLAG if text is None else _SET_STRING
        _syscall(_SYS_FSCONFIG, context, command, key, text, 0)
    except OSError as error:
        if not is_optional or error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise


def _read_messages(context: int) -> str:
    """Return the messages of a file system context, without their level."""
    lines = []
    while context >= 0:
        try:
            line = os.read(context, _LOG_SIZE)
        except OSError:  # ENODATA: that was the last
            break
        lines.append(line.decode(errors="replace").partition(" ")[2].strip())
    return "; ".join(lines)


def map_ids(mount_fd: int, namespace_fd: int) -> None:
    """Show the owners in a mount as a user namespace maps them.

    Args:
        mount_fd: a mount that is attached nowhere yet.
        namespace_fd: a user namespace, not the initial one.

    Raises:
        MountError: kernel (Linux 5.12) or file system cannot, or it is no such namespace.
    """
    request = _MOUNT_ATTR.pack(_MOUNT_ATTR_IDMAP, 0, 0, namespace_fd)
    try:
        _syscall(_SYS_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, request, len(request))
    except OSError as error:
        msg = f"cannot map the ids of the mount: {error.strerror}"
        raise MountError(msg, error.errno or errno.EIO) from None


def attach_mount(mount_fd: int, path: str) -> None:
    """Put a detached mount on a directory.

    Raises:
        OSError: ``ELOOP``: there is a symlink on the way; else as move_mount(2).
    """
    with _pinned(path) as place:
        _syscall(_SYS_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH)


def attach_mount_to(mount_fd: int, directory_fd: int) -> None:
    """Put a detached mount on a directory that is open already.

    Raises:
        OSError: as move_mount(2).
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_SYS_MOVE_MOUNT, mount_fd, b"", directory_fd, b"", flags)


def mount_device(fd: int) -> int:
    """Return the device number of a mount, also of one whose files are not ours to see.

    A FUSE file system that is another user's tells root nothing else, and is not asked.

    Raises:
        OSError: as statx(2).
    """
    result = ctypes.create_string_buffer(_STATX_SIZE)
    if libc().statx(fd, b"", _AT_EMPTY_PATH, 0, result):
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))
    return os.makedev(*_STATX_DEVICE.unpack_from(result))


def detach_mount(path: str, device: int | None = None) -> None:
    """Take the topmost mount at ``path`` out of the tree; its users may finish.

    Args:
        path: without symlinks.
        device: device number of the mount that is meant; None: whichever is there.

    Raises:
        OSError: ``ELOOP``: there is a symlink on the way; ``ESTALE``: another mount is there; else
            as umount2(2).
    """
    with _pinned(path) as place:
        if device is None:
            _unmount(place, _MNT_DETACH | _UMOUNT_NOFOLLOW, path)
        else:
            with _opened_mount(place, device, path) as fd:  # this one, whatever comes upon it
                _unmount(b"/proc/self/fd/%d" % fd, _MNT_DETACH, path)


def unmount(path: str, device: int | None = None) -> None:
    """Take the topmost mount at ``path`` out of the tree, unless it is in use.

    Args:
        path: without symlinks.
        device: as for :func:`detach_mount`.

    Raises:
        OSError: ``EBUSY``; else as :func:`detach_mount`.
    """
    with _pinned(path) as place:
        if device is not None:
            with _opened_mount(place, device, path):
                pass  # open, it would be in use
        _unmount(place, _UMOUNT_NOFOLLOW, path)


def _unmount(place: bytes, flags: int, path: str) -> None:
    if libc().umount2(place, flags):
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason), path)


@contextmanager
def _opened_mount(place: bytes, device: int, path: str) -> Iterator[int]:
    """Open the root of a mount, which is asked nothing, so a dead one can be opened too.

    Raises:
        OSError: ``ESTALE``: another mount is there.
    """
    fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if mount_device(fd) != device:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _pinned(path: str) -> Iterator[bytes]:
    """Name a place by a descriptor of its directory, reached without symlinks."""
    parent, name = os.path.split(os.fsencode(path))
    flags = os.O_PATH | os.O_DIRECTORY
    fd = openat2(_AT_FDCWD, parent or b".", flags, resolve=Resolve.NO_SYMLINKS)
    try:
        yield b"/proc/self/fd/%d/%s" % (fd, name)
    finally:
        os.close(fd)


def is_initial_user_namespace() -> bool:
    """Whether capabilities that we may have are those of the whole machine."""
    return os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
