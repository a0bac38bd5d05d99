"""Whose rights a thread has in the file system: setfsuid(2), setgroups(2), capabilities(7).

Linux keeps these for each thread.  A thread that is made inherits them from its maker; a program
that is started does not keep them: it has the process's own user, and so all of its rights.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from cfs.errors import UnsupportedError
from cfs.linux.libc import libc

__all__ = ["Credentials", "acting_as", "is_acting"]

# the C library's setgroups(3) changes all threads; numbers of the system call on 64 bit
_SYS_SETGROUPS = {
    "x86_64": 116,
    "aarch64": 159,
    "riscv64": 159,
    "loongarch64": 159,
    "ppc64le": 81,
    "s390x": 206,
}
_CAPABILITY_VERSION = 0x20080522
_HALF_BITS = 32
_QUERY = 0xFFFF_FFFF  # no user and no group: setfsuid and setfsgid only tell


class _Header(ctypes.Structure):
    """``struct __user_cap_header_struct``; pid 0 is the calling thread."""

    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    """``struct __user_cap_data_struct``, half of each set."""

    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the kernel looks at when a thread uses files.

    Attributes:
        uid: user.
        gid: group.
        groups: supplementary groups.
        capabilities: in effect, a bit for each.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    capabilities: int = 0

    @classmethod
    def current(cls) -> Self:
        """Return those of the calling thread."""
        return cls(
            uid=_set_id("setfsuid", _QUERY),
            gid=_set_id("setfsgid", _QUERY),
            groups=frozenset(os.getgroups()),
            capabilities=_join(half.effective for half in _get_capabilities()),
        )


@contextmanager
def acting_as(credentials: Credentials) -> Iterator[None]:
    """Give the calling thread these rights for the duration of a block.

    Blocks may nest.  Capabilities beyond those that are permitted to the thread cannot be had.

    Raises:
        UnsupportedError: no such processor is known to us.
        OSError: ``EPERM``: the process may not.
    """
    before = Credentials.current()
    if before == credentials:
        yield
        return
    try:
        _apply(credentials)
        yield
    finally:
        _apply(before)


def is_acting() -> bool:
    """Whether the calling thread uses files as another user than that of the process."""
    return _set_id("setfsuid", _QUERY) != os.geteuid()


def _apply(credentials: Credentials) -> None:
    _set_capabilities(None)  # whoever gave them up needs them back for the rest
    if frozenset(os.getgroups()) != credentials.groups:
        _set_groups(sorted(credentials.groups))
    _set_id("setfsgid", credentials.gid)
    _set_id("setfsuid", credentials.uid)
    _set_capabilities(credentials.capabilities)
    if Credentials.current() != credentials:  # setfsuid and setfsgid tell of no errors
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _set_id(name: str, number: int) -> int:
    """Call setfsuid or setfsgid; return what it was before."""
    function = getattr(libc(), name)
    return int(function(ctypes.c_uint32(number))) & 0xFFFF_FFFF


def _set_groups(groups: list[int]) -> None:
    number = _SYS_SETGROUPS.get(platform.machine())
    if number is None:
        msg = f"cannot act for other users on {platform.machine()}"
        raise UnsupportedError(msg)
    array = (ctypes.c_uint32 * len(groups))(*groups)
    _check(libc().syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), array))


def _get_capabilities() -> "ctypes.Array[_Sets]":
    sets = (_Sets * 2)()
    _check(libc().capget(ctypes.byref(_Header(_CAPABILITY_VERSION, 0)), sets))
    return sets


def _set_capabilities(effective: int | None) -> None:
    """Put capabilities into effect, all that are permitted if None."""
    sets = _get_capabilities()
    for index, half in enumerate(sets):
        wanted = half.permitted if effective is None else effective >> index * _HALF_BITS
        half.effective = wanted & 0xFFFF_FFFF
    _check(libc().capset(ctypes.byref(_Header(_CAPABILITY_VERSION, 0)), sets))


def _join(halves: Iterator[int]) -> int:
    return sum(half << index * _HALF_BITS for index, half in enumerate(halves))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
