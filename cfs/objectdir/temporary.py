"""Files that have no place among the objects yet (spec repository 2.4).

They have no name at all where the file system can do that, and vanish with their descriptor.
Elsewhere they are called ``.tmp-object-`` and twelve characters, directly in the directory of
objects, never in its fan-out directories, where garbage collection and fsck would find them.
"""

import errno
import os
import secrets
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from cfs.errors import UnsupportedError
from cfs.linux.files import (
    link_unnamed,
    open_unnamed,
    rename_noreplace,
    reopen_readonly,
    write_all,
)

__all__ = ["TEMPORARY_PREFIX", "Temporary", "discarding"]

TEMPORARY_PREFIX = b".tmp-object-"
_ALPHANUMERICS = string.ascii_letters + string.digits
_MODE = 0o644
_NO_FD = -1


class Temporary:
    """One such file.  Whoever holds it alone uses it: no locks.

    Attributes:
        directory: descriptor of the directory of objects, borrowed.
        fd: the file, owned; open for writing until :meth:`reopen`.
        name: its temporary name, to be removed; None without.
    """

    __slots__ = ("directory", "fd", "name")

    def __init__(self, directory: int, fd: int, name: bytes | None) -> None:
        """Take over ``fd``, and the name if there is one."""
        self.directory = directory
        self.fd = fd
        self.name = name

    @classmethod
    def create(cls, directory: int) -> Self:
        """Make an empty file.

        Raises:
            OSError: as open(2).
        """
        try:
            return cls(directory, open_unnamed(directory, _MODE), None)
        except UnsupportedError:
            name = _random_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            return cls(directory, os.open(name, flags, _MODE, dir_fd=directory), name)

    @classmethod
    def link(cls, directory: int, fd: int) -> Self:
        """Make another name of a file that exists; ``fd`` is borrowed.

        Raises:
            OSError: as linkat(2), ``EXDEV`` and ``EMLINK`` for instance.
        """
        own_fd = os.dup(fd)
        name = _random_name()
        try:
            link_unnamed(fd, directory, name)
        except BaseException:
            os.close(own_fd)
            raise
        return cls(directory, own_fd, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: as write(2).
        """
        write_all(self.fd, data)

    def size(self) -> int:
        """Return the size in bytes."""
        return os.fstat(self.fd).st_size

    def reopen(self) -> None:
        """Open the file read-only, and no longer for writing."""
        reader = reopen_readonly(self.fd)
        os.close(self.fd)
        self.fd = reader

    def swap(self, other: "Temporary") -> None:
        """Exchange what the two stand for."""
        self.fd, other.fd = other.fd, self.fd
        self.name, other.name = other.name, self.name

    def place(self, fan_out: int, rest: bytes) -> None:
        """Give the file its final name.

        Raises:
            FileExistsError: the name is taken; nothing was changed.
            OSError: as linkat(2) and renameat2(2).
        """
        if self.name is None:
            link_unnamed(self.fd, fan_out, rest)
            return
        try:
            rename_noreplace(self.directory, self.name, fan_out, rest)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # a file system that does not know the flag, FUSE for instance
            os.link(self.name, rest, src_dir_fd=self.directory, dst_dir_fd=fan_out)
            os.unlink(self.name, dir_fd=self.directory)
        self.name = None

    def replace(self, fan_out: int, rest: bytes) -> None:
        """Give the file its final name, in place of what has it.

        Raises:
            OSError: as linkat(2) and rename(2).
        """
        if self.name is None:
            name = _random_name()
            link_unnamed(self.fd, self.directory, name)
            self.name = name
        os.rename(self.name, rest, src_dir_fd=self.directory, dst_dir_fd=fan_out)
        self.name = None

    def discard(self) -> None:
        """Close the file, and remove the temporary name if it still has one."""
        if self.name is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=self.directory)
            self.name = None
        if self.fd != _NO_FD:
            os.close(self.fd)
            self.fd = _NO_FD


@contextmanager
def discarding(temporary: Temporary) -> Iterator[Temporary]:
    """Discard a file if the block fails; otherwise whoever it is given to does."""
    try:
        yield temporary
    except BaseException:
        temporary.discard()
        raise


def _random_name() -> bytes:
    characters = (secrets.choice(_ALPHANUMERICS) for _ in range(12))
    return TEMPORARY_PREFIX + "".join(characters).encode()
