"""The mount calls that Python lacks, and the kernel's list of mounts.

Linux man pages fsopen(2), fsconfig(2), fsmount(2), move_mount(2), umount(2); Linux 5.2 or
later.  Paths are taken as the kernel takes them.  No shared state: any thread may call.
"""

import ctypes
import errno
import functools
import os
import re
from collections.abc import Sequence
from enum import IntFlag

from cfs.errors import MountError

__all__ = ["MountAttr", "attach_mount", "create_mount", "detach_mount", "mounted_at"]

# numbers that all architectures share
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_AT_FDCWD = -100
_CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6  # enum fsconfig_command
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MNT_DETACH = 2
_LOG_SIZE = 4096


class MountAttr(IntFlag):
    """``MOUNT_ATTR_*`` of fsmount."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *args: int | bytes | None) -> int:
    """Call with integers and texts; ``OSError`` without a name on failure."""
    typed = [ctypes.c_char_p(a) if a is None or isinstance(a, bytes) else ctypes.c_long(a)
             for a in args]  # fmt: skip
    result = int(_libc().syscall(ctypes.c_long(number), *typed))
    if result < 0:
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))
    return result


def create_mount(
    fstype: str, options: Sequence[tuple[str, str | bytes | None]], attributes: MountAttr
) -> int:
    """Make a file system and a mount of it that is attached nowhere yet.

    Args:
        fstype: type, without subtype.
        options: keys and values, in this order; a flag has value None.
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
            command = _SET_FLAG if value is None else _SET_STRING
            text = value.encode() if isinstance(value, str) else value
            _syscall(_SYS_FSCONFIG, context, command, key.encode(), text, 0)
        _syscall(_SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _syscall(_SYS_FSMOUNT, context, _CLOEXEC, attributes)
    except OSError as error:
        reason = error.errno or errno.EIO
        msg = f"cannot make a mount of type {fstype}: {_kernel_log(context) or error.strerror}"
        raise MountError(msg, reason) from None
    finally:
        if context >= 0:
            os.close(context)


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
    if _libc().umount2(os.fsencode(path), _MNT_DETACH):
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
