"""The mount calls that Python lacks, and the kernel's list of mounts.

Linux man pages fsopen(2), fsconfig(2), fsmount(2), move_mount(2), umount(2); Linux 5.2 or
later.  Paths are taken as the kernel takes them.  No shared state: any thread may call.
"""

import ctypes
import errno
import os
import re
from collections.abc import Sequence
from enum import IntFlag

from cfs.errors import MountError
from cfs.linux.libc import libc

__all__ = [
    "MountAttr",
    "Option",
    "attach_mount",
    "create_mount",
    "detach_mount",
    "is_initial_user_namespace",
    "mounted_at",
]

Option = tuple[str, str | bytes | int | None]

# numbers that all architectures share
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_AT_FDCWD = -100
_CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_SET_FLAG, _SET_STRING, _SET_FD, _CMD_CREATE = 0, 1, 5, 6  # enum fsconfig_command
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MNT_DETACH = 2
_LOG_SIZE = 4096
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO


class MountAttr(IntFlag):
    """``MOUNT_ATTR_*`` of fsmount."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4


def _syscall(number: int, *args: int | bytes | None) -> int:
    """Call with integers and texts; ``OSError`` without a name on failure."""
    typed = [ctypes.c_char_p(a) if a is None or isinstance(a, bytes) else ctypes.c_long(a)
             for a in args]  # fmt: skip
    result = int(libc().syscall(ctypes.c_long(number), *typed))
    if result < 0:
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))
    return result


def create_mount(fstype: str, options: Sequence[Option], attributes: MountAttr) -> int:
    """Make a file system and a mount of it that is attached nowhere yet.

    Args:
        fstype: type, without subtype.
        options: keys and values, in this order; a number is a descriptor, a flag has value None.
        attributes: of the mount.

    Returns:
        Descriptor of the mount, owned by the caller.  The mount ends with it, unless
        :func:`attach_mount` gives it a place.

    Raises:
        MountError: with the text that the kernel left in the file system context.
    """
    context = -1
    try:
        context = _syscall(_SYS_FSOPEN, fstype.encode(), _CLOEXEC)
        for key, value in options:
            _configure(context, key.encode(), value)
        _syscall(_SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _syscall(_SYS_FSMOUNT, context, _CLOEXEC, attributes)
    except OSError as error:
        reason = error.errno or errno.EIO
        msg = f"cannot make a mount of type {fstype}: {_kernel_log(context) or error.strerror}"
        raise MountError(msg, reason) from None
    finally:
        if context >= 0:
            os.close(context)


def _configure(context: int, key: bytes, value: str | bytes | int | None) -> None:
    if isinstance(value, int):
        _syscall(_SYS_FSCONFIG, context, _SET_FD, key, None, value)
        return
    text = value.encode() if isinstance(value, str) else value
    command = _SET_FLAG if text is None else _SET_STRING
    _syscall(_SYS_FSCONFIG, context, command, key, text, 0)


def _kernel_log(context: int) -> str:
    """Return the messages of a file system context, without their level."""
    lines = []
    while context >= 0:
        try:
            line = os.read(context, _LOG_SIZE)
        except OSError:  # ENODATA: that was the last
            break
        lines.append(line.decode(errors="replace").partition(" ")[2].strip())
    return "; ".join(lines)


def attach_mount(mount_fd: int, path: str) -> None:
    """Put a detached mount on a directory.

    Raises:
        OSError: as move_mount(2).
    """
    _syscall(_SYS_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)


def detach_mount(path: str) -> None:
    """Take the topmost mount at ``path`` out of the tree; its users may finish.

    Raises:
        OSError: as umount2(2) with ``MNT_DETACH``.
    """
    if libc().umount2(os.fsencode(path), _MNT_DETACH):
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason), path)


def mounted_at(path: str) -> int | None:
    """Return the device number of the topmost mount at ``path``, or None.

    Asks no file system, so it works for dead mounts as well; ``path`` has no symlinks.
    """
    device = None
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = line.split(b" ")
            if _unescaped(fields[4]) == os.fsencode(path):
                major, _, minor = fields[2].partition(b":")
                device = os.makedev(int(major), int(minor))
    return device


def _unescaped(text: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)


def is_initial_user_namespace() -> bool:
    """Whether capabilities that we may have are those of the whole machine."""
    return os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
