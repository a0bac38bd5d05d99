"""Links that keep the images of live FUSE mounts (spec cli-and-varlink c.7).

While an image is served, ``images/refs/mounted/BOOTID-PID-START`` links to it: a ref as any other,
so that a collection of composefs-rs keeps it as well.  The server removes it at the end.  If it
cannot, the link stays as a leftover, which the next server or collection removes.

A link is alive while the process that it names runs, or while somebody locks the byte of the
directory that belongs to its name (``F_OFD_SETLK``, fcntl_locking(2)).  The lock is held by all
processes of the mount: a session that outlives its supervisor still counts, and so does a
server in another PID name space, whose numbers mean nothing here.

Links are made while the maker holds the store's shared lock, and locked before they are there.
Where none can be made, the server holds the shared lock itself.  Any thread may call.
"""

import errno
import fcntl
import hashlib
import os
import re
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from cfs.errors import CfsError
from cfs.linux.files import openat2
from cfs.linux.processes import boot_id, is_running, start_time
from cfs.linux.traces import Trace
from cfs.repository.refs import ensure_directory

if TYPE_CHECKING:
    from cfs.digest import Digest
    from cfs.repository.repository import Repository

__all__ = ["PREFIX", "is_alive", "is_reserved", "keep_image", "keep_store", "remove_dead"]

PREFIX = b"mounted/"
_PLACE = [b"images", b"refs", b"mounted"]
_PATH = b"/".join(_PLACE)
_NAME = re.compile(rb"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-([0-9]{1,10})-([0-9]{1,20})")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_POSITION_BITS = 62  # l_start is a signed 64 bit number


def is_reserved(name: bytes) -> bool:
    """Whether a name below ``images/refs`` belongs to mounts, and is no user's."""
    return name.startswith(PREFIX) or name == PREFIX.rstrip(b"/")


def keep_image(repository: "Repository", digest: "Digest", pid: int) -> Trace:
    """Keep an image of the store, with all its objects, from collections.

    Args:
        repository: open, so that no collection runs meanwhile.
        digest: of an image in ``images/``.
        pid: of the server, which shall hold what is returned, and remove its name at the end.

    Returns:
        The link or, where none can be made, the store's shared lock; the descriptor is the
        caller's.

    Raises:
        OSError: the store can neither be written nor locked.
    """
    try:
        repository.check_writable()
        return _make_link(repository.fd, digest, pid)
    except (CfsError, OSError):
        return keep_store(repository)


def keep_store(repository: "Repository") -> Trace:
    """Keep everything in the store: hold its shared lock, apart from the repository's own.

    Raises:
        OSError: as open(2) and flock(2).
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(".", flags, dir_fd=repository.fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the repository holds it: never waits
    except BaseException:
        os.close(fd)
        raise
    return Trace(fd)


def is_alive(repository_fd: int, name: bytes) -> bool:
    """Whether the mount of a link ``mounted/NAME`` is still served.

    Args:
        repository_fd: the store.
        name: with or without ``mounted/``; one that no server gives counts as alive.

    Raises:
        OSError: the directory is there and cannot be opened.
    """
    directory = _open_directory(repository_fd)
    if directory is None:
        return _NAME.fullmatch(name.removeprefix(PREFIX)) is None
    try:
        return _is_alive(directory, name.removeprefix(PREFIX))
    finally:
        os.close(directory)


def remove_dead(repository_fd: int) -> int:
    """Remove links of mounts that have ended; return their number.

    Links that we may not remove stay.  Needs no lock: a dead link never comes to life.

    Raises:
        OSError: the directory is there and cannot be read.
    """
    directory = _open_directory(repository_fd)
    if directory is None:
        return 0
    try:
        return _remove_dead(directory)
    finally:
        os.close(directory)


def _make_link(repository_fd: int, digest: "Digest", pid: int) -> Trace:
    start = start_time(pid)
    if start is None:
        raise ProcessLookupError(pid)
    name = f"{boot_id()}-{pid}-{start}"
    directory = ensure_directory(repository_fd, _PLACE)
    try:
        lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _position(name.encode()), 1, 0)
        fcntl.fcntl(directory, fcntl.F_OFD_SETLK, lock)
        _remove_dead(directory)
        os.symlink(f"../../{digest}", name, dir_fd=directory)
    except BaseException:
        os.close(directory)
        raise
    return Trace(directory, name)


def _position(name: bytes) -> int:
    """Return which byte of the directory a name's lock is on; two names may share one."""
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    return number % (1 << _POSITION_BITS)


def _is_alive(directory: int, name: bytes) -> bool:
    match = _NAME.fullmatch(name)
    if match is None:
        return True
    boot, pid, start = match.groups()
    if boot.decode() != boot_id():
        return False
    if is_running(int(pid), int(start)):
        return True
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _position(name), 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(directory, fcntl.F_OFD_GETLK, asked))
    return bool(answer[0] != fcntl.F_UNLCK)


def _remove_dead(directory: int) -> int:
    nr_removed = 0
    for name in os.listdir(directory):
        if not _is_alive(directory, os.fsencode(name)):
            with suppress(OSError):  # another one's, or removed by another one just now
                os.unlink(name, dir_fd=directory)
                nr_removed += 1
    return nr_removed


def _open_directory(repository_fd: int) -> int | None:
    """Open the directory of links; None if there is none: composefs-rs may call an image so."""
    try:
        return openat2(repository_fd, _PATH, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
