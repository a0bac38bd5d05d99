"""A directory of objects, read and written (spec repository 1.4, 2.1 to 2.10).

An object appears under its name when its contents are on disk and known to have that digest,
never before: a crash at any moment leaves no wrong object.  Any number of threads and processes
may write to the same directory; each of them calls :meth:`ObjectDirectory.flush` before it
refers to what it has put.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, NotFoundError
from cfs.fsverity import compute_digest, compute_file_digest
from cfs.linux.files import copy_contents, naming
from cfs.objectdir.imports import Importer, Method, digest_of
from cfs.objectdir.pending import Pending
from cfs.objectdir.stored import check_object, is_good, open_stored
from cfs.objectdir.temporary import Temporary, discarding
from cfs.objectdir.verity import Verity, seal
from cfs.objectdir.writer import Contents, ObjectWriter

__all__ = ["ObjectDirectory"]


class ObjectDirectory:
    """Reads and writes the objects of one directory.  Any thread may call.

    State: the descriptor, opened once under ``_lock``; what :class:`Pending` and
    :class:`Importer` guard themselves.
    """

    def __init__(self, parent_fd: int, name: bytes, algorithm: Algorithm, verity: Verity) -> None:
        """Use the directory ``name``, made when something is written first.

        Args:
            parent_fd: the directory that holds it; borrowed until :meth:`close`.
            name: its name; while it is missing, there are no objects.
            algorithm: of the digests.
            verity: what is demanded of fs-verity.
        """
        self.algorithm = algorithm
        self.verity = verity
        self._parent_fd = parent_fd
        self._name = name
        self._lock = threading.Lock()
        self._fd = -1
        self._importer = Importer(algorithm, verity)
        self._pending = Pending(name, self._has_contents)

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | bytes | os.PathLike[str],
        algorithm: Algorithm = Algorithm.SHA256,
        verity: Verity = Verity.TRY,
    ) -> Iterator[Self]:
        """Open a flat directory of objects, made if missing; what was put is durable at the end.

        Raises:
            OSError: it cannot be made or opened, or an object cannot be written.
        """
        os.makedirs(path, mode=0o755, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with cls(fd, b".", algorithm, verity) as objects:
                yield objects
                objects.flush()
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was put since the last :meth:`flush`, and close the directory."""
        self._pending.discard()
        with self._lock:
            if self._fd != -1:
                os.close(self._fd)
                self._fd = -1

    @property
    def fd(self) -> int:
        """The directory, open for reading; borrowed.

        Raises:
            FileNotFoundError: nothing was ever written.
            OSError: as open(2).
        """
        with self._lock:
            if self._fd == -1:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                with naming(self._name):
                    self._fd = os.open(self._name, flags, dir_fd=self._parent_fd)
            return self._fd

    def _ensure_fd(self) -> int:
        """Return the directory, made if missing."""
        if self._fd == -1:
            with suppress(FileExistsError), naming(self._name):
                os.mkdir(self._name, dir_fd=self._parent_fd)
        return self.fd

    def put(self, fd: int, size: int, digest: Digest) -> bool:
        """Copy a file into the directory, unless it is there; tell whether it was new.

        What is there counts if it has the right size, and the right digest where the kernel can
        tell.  Reading its contents would cost as much as writing them; fsck does.

        Args:
            fd: regular file open for reading; borrowed, its position moves.
            size: its size in bytes.
            digest: its fs-verity digest, checked against that of the copy.

        Raises:
            IntegrityError: the copy has another digest.
            UnsupportedError: fs-verity is required, and kernel or file system lack it.
            OSError: reading or writing failed, ``ENOSPC`` for instance.
        """
        directory = self._ensure_fd()
        with naming(digest.object_path):
            if self._is_present(digest, size):
                return False
            with discarding(Temporary.create(directory)) as temporary:
                copy_contents(fd, temporary.fd, size)
                found = digest_of(temporary, size, self.algorithm, self.verity)
                _check_digest(digest, found, size)
        return self._pending.add(digest, temporary)

    def put_contents(self, contents: Contents, digest: Digest, *, thorough: bool = False) -> bool:
        """Store bytes that have a known digest, unless they are there; tell whether they were new.

        As :meth:`put`, without another look at the contents.

        Args:
            contents: the bytes.
            digest: of the bytes.
            thorough: read what is there, if the kernel cannot tell its digest.
        """
        size = len(contents)
        directory = self._ensure_fd()
        with naming(digest.object_path):
            if self._is_present(digest, size, thorough=thorough):
                return False
            with discarding(Temporary.create(directory)) as temporary:
                temporary.write(contents)
                measured = seal(temporary, self.verity, self.algorithm)
                if measured:
                    _check_digest(digest, measured, size)
        return self._pending.add(digest, temporary)

    def put_bytes(self, data: Contents) -> Digest:
        """Store bytes, unless they are there: images, streams, JSON documents.

        Unlike :meth:`put` reads what is there, if the kernel cannot tell its digest.

        Raises:
            UnsupportedError: fs-verity is required, and kernel or file system lack it.
            OSError: writing failed, ``ENOSPC`` for instance.
        """
        digest = compute_digest(data, self.algorithm)
        self.put_contents(data, digest, thorough=True)
        return digest

    def create(self) -> ObjectWriter:
        """Return a writer for an object that comes in pieces; a context manager."""
        return ObjectWriter(self)

    def import_file(
        self,
        fd: int,
        size: int,
        *,
        digest: Digest | None = None,
        link: bool = True,
        copy: bool = True,
    ) -> tuple[Digest, Method]:
        """Make an object of a file: as reflink, else as hard link, else as copy.

        A hard link shares mode, owner, times and xattrs with the file, and with fs-verity nobody
        can write to it any more (spec repository 2.5).

        Args:
            fd: regular file open for reading; borrowed, its position moves.
            size: its size in bytes.
            digest: its digest if that is known; an object of this name and size is taken for it.
            link: whether it may be hard linked: not if others could still write to it.
            copy: whether it may be copied.

        Raises:
            IntegrityError: the object has another digest or size.
            UnsupportedError: fs-verity is required, and kernel or file system lack it.
            OSError: reading or writing failed; the reason why it cannot be linked if it must
                not be copied.
        """
        directory = self._ensure_fd()
        if digest and self._is_present(digest, size):
            return digest, Method.PRESENT
        with naming(self._name):
            taken = self._importer.take(directory, fd, size, link=link, copy=copy)
        temporary, found, method = taken
        with discarding(temporary):
            if digest:
                _check_digest(digest, found, size)
            is_present = self._is_present(found, size)
        if is_present:
            temporary.discard()
        elif self._pending.add(found, temporary):
            return found, method
        return found, Method.PRESENT

    def flush(self) -> None:
        """Give all objects that were put their names, and make contents and names durable.

        What other threads have put is included.  Costs one or two syncfs, none if nothing was
        put or found present since the last time.

        Raises:
            OSError: a sync failed, here or earlier: then every later call fails too.
        """
        self._pending.flush(lambda: self.fd)

    def has(self, digest: Digest) -> bool:
        """Whether there is a regular file of that name, or one that waits for it."""
        if digest in self._pending:
            return True
        try:
            fd = self._open(digest)
        except (OSError, IntegrityError):
            return False
        os.close(fd)
        return True

    def is_sound(self, digest: Digest) -> bool:
        """Whether an object is there and is what its name says; read if the kernel cannot tell.

        Raises:
            OSError: it cannot be opened or read.
        """
        try:
            fd = self.open_object(digest)
        except (NotFoundError, IntegrityError):
            return False
        try:
            size = os.fstat(fd).st_size
            measured = check_object(fd, digest, Verity.TRY)
            return (measured or compute_file_digest(fd, size, digest.algorithm)) == digest
        finally:
            os.close(fd)

    def open_object(self, digest: Digest) -> int:
        """Return a read-only descriptor of an object.

        Raises:
            NotFoundError: there is no such object.
            IntegrityError: it is no regular file, the kernel measures another digest, or
                fs-verity is required and off.
            OSError: as openat2(2).
        """
        waiting = self._pending.open(digest)
        if waiting is not None:
            return waiting
        try:
            fd = self._open(digest)
        except FileNotFoundError:
            msg = f"object not found: {digest}"
            raise NotFoundError(msg) from None
        try:
            check_object(fd, digest, self.verity)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open(self, digest: Digest) -> int:
        return open_stored(self.fd, digest.object_path, digest)

    def _is_present(self, digest: Digest, size: int, *, thorough: bool = False) -> bool:
        """Whether an object is there, or waits for its name; one that is damaged is not."""
        if digest in self._pending:
            return True
        if is_good(self.fd, digest.object_path, digest, size, self.verity, thorough=thorough):
            self._pending.note_present()
            return True
        return False

    def _has_contents(self, fan_out: int, rest: bytes, digest: Digest, size: int) -> bool:
        """Whether an object that got its name meanwhile is the right one."""
        return is_good(fan_out, rest, digest, size, self.verity, thorough=True)

    def create_temporary(self) -> Temporary:
        """Return an empty file for :meth:`adopt`.

        Raises:
            OSError: as open(2).
        """
        with naming(self._name):
            return Temporary.create(self._ensure_fd())

    def adopt(
        self, temporary: Temporary, size: int, *, thorough: bool = False
    ) -> tuple[Digest, bool]:
        """Take over a file that is complete; return its digest, and whether it was new.

        Args:
            temporary: the file.
            size: its size in bytes.
            thorough: as for :meth:`put_contents`.

        Raises:
            UnsupportedError: fs-verity is required, and kernel or file system lack it.
            OSError: as read(2) and the kernel's fs-verity.
        """
        with discarding(temporary):
            digest = digest_of(temporary, size, self.algorithm, self.verity)
            is_present = self._is_present(digest, size, thorough=thorough)
        if is_present:
            temporary.discard()
            return digest, False
        return digest, self._pending.add(digest, temporary)


def _check_digest(expected: Digest, found: Digest, size: int) -> None:
    if found != expected:
        msg = f"object {expected}: the copy of {size} bytes has the digest {found}"
        raise IntegrityError(msg)
