"""A directory of objects, written to: ``xx/rest``, named by the fs-verity digest.

This is the store of ``mkcomposefs --digest-store`` (spec repository 2.10).  An object appears
under its name only when its copy was written in full, synced, and found to have the promised
digest; before that it is a file without a name, or a temporary one beside the fan-out
directories.  So a crash at any moment leaves no wrong object.  Any number of threads and
processes may write to the same directory.
"""

import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import compute_file_digest, enable, measure
from cfs.linux.files import copy_contents, link_unnamed, naming, open_unnamed, reopen_readonly

__all__ = ["ObjectDirectory"]

_log = logging.getLogger(__name__)
_MODE = 0o644
_NR_TRIES = 4


class ObjectDirectory:
    """Puts files into a directory of objects.

    Made by :meth:`open`.  Threads may share it: its two pieces of state, the fan-out
    directories used and whether fs-verity works here, only ever change in one direction, and
    knowing them late costs a system call.
    """

    def __init__(self, fd: int) -> None:
        """Use the directory ``fd``, which is borrowed."""
        self._fd = fd
        self._used: set[bytes] = set()
        self._has_verity = True

    @classmethod
    @contextmanager
    def open(cls, path: str | bytes | os.PathLike[str]) -> Iterator[Self]:
        """Open a directory of objects, made if missing; at the end its names are synced.

        Raises:
            OSError: it cannot be made or opened.
        """
        os.makedirs(path, mode=0o755, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            objects = cls(fd)
            yield objects
            objects.sync()
        finally:
            os.close(fd)

    def put(self, fd: int, size: int, digest: Digest) -> bool:
        """Copy a file into the directory, unless it is there; tell whether it was new.

        The object gets fs-verity if kernel and file system have it.

        Args:
            fd: regular file open for reading; borrowed, its position moves.
            size: its size in bytes.
            digest: its fs-verity digest; gives the name and the algorithm.

        Raises:
            IntegrityError: the copy has another digest, or what is there another size.
            OSError: reading or writing failed, ``ENOSPC`` for instance.
        """
        path = digest.object_path
        with naming(path):
            if self._is_present(path, size):
                return False
            writer, temporary = self._create()
            try:
                try:
                    copy_contents(fd, writer, size)
                    os.fchmod(writer, _MODE)
                    os.fsync(writer)
                    reader = reopen_readonly(writer)
                finally:
                    os.close(writer)
                try:
                    self._check(reader, size, digest)
                    return self._publish(reader, temporary, path)
                finally:
                    os.close(reader)
            finally:
                if temporary:
                    with suppress(FileNotFoundError):
                        os.unlink(temporary, dir_fd=self._fd)

    def sync(self) -> None:
        """Make the names of all objects that were put durable; their contents are already.

        Raises:
            OSError: as fsync(2).
        """
        for name in sorted(self._used):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        if self._used:
            os.fsync(self._fd)

    def _is_present(self, path: bytes, size: int) -> bool:
        try:
            found = os.stat(path, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            kind = stat.filemode(found.st_mode)[0]
            msg = (
                f"object {path.decode()}: expected a regular file of {size} bytes, "
                f"found type {kind!r} with {found.st_size}"
            )
            raise IntegrityError(msg)
        return True

    def _create(self) -> tuple[int, bytes | None]:
        """Make an empty file to write to; with its name if it has to have one."""
        try:
            return open_unnamed(self._fd, _MODE), None
        except UnsupportedError:
            name = b".tmp-object-" + secrets.token_hex(6).encode()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            return os.open(name, flags, _MODE, dir_fd=self._fd), name

    def _check(self, reader: int, size: int, digest: Digest) -> None:
        """Compare the digest of the copy; measured where the kernel has computed it."""
        if self._has_verity and self._enable(reader, digest.algorithm):
            found = measure(reader)
        else:
            found = compute_file_digest(reader, size, digest.algorithm)
        if found != digest:
            msg = f"object {digest}: the copy of {size} bytes has the digest {found}"
            raise IntegrityError(msg)

    def _enable(self, reader: int, algorithm: Algorithm) -> bool:
        """Try to turn on fs-verity.  Failure is no error, as in C: the copy is read then."""
        for _ in range(_NR_TRIES):
            try:
                enable(reader, algorithm)
            except UnsupportedError:
                self._has_verity = False
                return False
            except OSError as error:
                if error.errno != errno.ETXTBSY:
                    _log.debug("object without fs-verity: %s", error)
                    return False
                # a child forked by another thread holds the writer until it calls exec
                time.sleep(0.001)
            else:
                return True
        return False

    def _publish(self, reader: int, temporary: bytes | None, path: bytes) -> bool:
        """Give the finished copy its name; False if another writer was faster."""
        fan_out = path[:2]
        if fan_out not in self._used:
            with suppress(FileExistsError):
                os.mkdir(fan_out, 0o755, dir_fd=self._fd)
            self._used.add(fan_out)
        if temporary:
            # replaces at most the same contents; file systems without links can do it too
            os.rename(temporary, path, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            return True
        try:
            link_unnamed(reader, self._fd, path)
        except FileExistsError:
            return False
        return True
