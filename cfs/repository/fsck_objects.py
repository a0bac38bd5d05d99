"""Check of the objects: whether each is what its name says; spec repository 9.1 step 2, 9.2.

A directory ``objects/XX`` is one piece of work, for any thread; digests are computed without
the interpreter lock.  Nothing is followed and nothing is waited for, whatever lies there.
"""

import errno
import os
import re
import stat
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from cfs.digest import Algorithm, Digest
from cfs.errors import CfsError, FormatError, IntegrityError
from cfs.fsverity import compute_file_digests, measure
from cfs.linux.files import naming, open_path, openat2, owned
from cfs.repository.findings import Report, describe_errno, show

if TYPE_CHECKING:
    from cfs.repository.repository import Repository

__all__ = [
    "FAN_OUTS",
    "check_fan_out",
    "check_objects_directory",
    "open_object_file",
    "parse_object_name",
    "type_name",
]

FAN_OUTS = tuple(f"{number:02x}".encode() for number in range(256))
_HEX_DIGITS = b"0123456789abcdefABCDEF"
_HEX = re.compile(rb"[%b]*" % _HEX_DIGITS)
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_BATCH_FILES = 32
_BATCH_SIZE = 4 << 20
_TYPE_NAMES = {
    stat.S_IFREG: "RegularFile",
    stat.S_IFDIR: "Directory",
    stat.S_IFLNK: "Symlink",
    stat.S_IFIFO: "Fifo",
    stat.S_IFSOCK: "Socket",
    stat.S_IFCHR: "CharacterDevice",
    stat.S_IFBLK: "BlockDevice",
}


class _File(NamedTuple):
    """An object whose digest has to be computed."""

    digest: Digest
    fd: int
    size: int


def type_name(mode: int) -> str:
    """Return the type of a file as composefs-rs calls it."""
    return _TYPE_NAMES.get(stat.S_IFMT(mode), "Unknown")


def parse_object_name(fan_out: bytes, name: bytes, algorithm: Algorithm) -> Digest:
    """Return the digest that a name below ``objects/XX`` stands for, in either case.

    Raises:
        FormatError: it stands for none; the message is that of composefs-rs.
    """
    if len(name) != 2 * algorithm.digest_size - len(fan_out):
        msg = "Invalid string length"
        raise FormatError(msg)
    if not _HEX.fullmatch(name):
        position, character = next(each for each in enumerate(name) if each[1] not in _HEX_DIGITS)
        msg = f"Invalid character {chr(character)!r} at position {position}"
        raise FormatError(msg)
    return Digest(bytes.fromhex((fan_out + name).decode()))


def open_object_file(path: bytes, dir_fd: int) -> int:
    """Open what should be an object for reading; the descriptor is the caller's.

    Raises:
        OSError: as open(2); of a link, what following it gives, and else ``ELOOP``; of what is
            neither file nor directory, ``ENXIO``.
    """
    mode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        os.stat(path, dir_fd=dir_fd)  # says why if it leads nowhere
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), os.fsdecode(path))
    return open_path(path, _OPEN, dir_fd=dir_fd)


def check_objects_directory(repository: "Repository") -> None:
    """Refuse a store whose ``objects`` is something else, a link to another store for instance.

    Raises:
        OSError: ``ENOTDIR``, or it cannot be opened.
    """
    with naming(b"objects"), suppress(FileNotFoundError):
        _ = repository.objects.fd


def check_fan_out(
    repository_fd: int, fan_out: bytes, algorithm: Algorithm, *, is_secure: bool
) -> Report:
    """Check everything in a directory ``objects/XX``; it may be missing.

    Args:
        repository_fd: directory of the store; borrowed.
        fan_out: ``XX``.
        algorithm: of the store.
        is_secure: fs-verity is demanded.

    Raises:
        OSError: it is no directory, or cannot be read.
    """
    path = b"objects/" + fan_out
    with ExitStack() as stack:
        try:
            with naming(path):
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                fd = owned(stack, openat2(repository_fd, path, flags))
        except FileNotFoundError:
            return Report()
        return _FanOut(fd, fan_out, algorithm, is_secure=is_secure).run()


class _FanOut:
    """The check of one directory; used by one thread."""

    def __init__(self, fd: int, fan_out: bytes, algorithm: Algorithm, *, is_secure: bool) -> None:
        self.report = Report()
        self._fd = fd
        self._fan_out = fan_out
        self._algorithm = algorithm
        self._is_secure = is_secure
        self._batch: list[_File] = []
        self._batch_size = 0

    def run(self) -> Report:
        try:
            for name in sorted(os.listdir(self._fd)):
                self._check_entry(os.fsencode(name))
            self._digest_batch()
        finally:
            for file in self._batch:
                os.close(file.fd)
        return self.report

    def _check_entry(self, name: bytes) -> None:
        try:
            digest = parse_object_name(self._fan_out, name, self._algorithm)
        except FormatError as error:
            path = show(b"objects/" + self._fan_out + b"/" + name)
            self.report.find("object-invalid-name", path, str(error))
            self.report.count_entry("objects", is_corrupted=True)
            return
        try:
            fd = open_object_file(name, self._fd)
        except OSError as error:
            self._reject(digest, "object-open-failed", describe_errno(error))
            return
        if not self._check_file(digest, fd):
            os.close(fd)
        elif len(self._batch) >= _BATCH_FILES or self._batch_size >= _BATCH_SIZE:
            self._digest_batch()

    def _check_file(self, digest: Digest, fd: int) -> bool:
        """Compare with what the kernel enforces; True if the content has to be read yet.

        It has to, with fs-verity too: the kernel checks a block when it is read, and measures
        the same whatever became of the blocks on the disk.
        """
        try:
            measured = measure(fd)
        except (OSError, CfsError):
            measured = None
        if measured is None or measured.algorithm is not self._algorithm:
            if self._is_secure:
                self._reject(digest, "object-verity-missing")
                return False
        elif measured != digest:
            self._reject(digest, "object-digest-mismatch", f"measured {measured}")
            return False
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            self._reject_content(digest)
            return False
        self._batch.append(_File(digest, fd, status.st_size))
        self._batch_size += status.st_size
        return True

    def _digest_batch(self) -> None:
        """Compute the digests of the files at hand; one that cannot be read costs a new start."""
        while self._batch:
            fds = [file.fd for file in self._batch]
            digests = compute_file_digests(
                fds, [file.size for file in self._batch], self._algorithm
            )
            nr_done = 0
            try:
                for computed in digests:
                    self._compare(self._batch[nr_done].digest, computed)
                    nr_done += 1
            except (OSError, IntegrityError):
                self._reject_content(self._batch[nr_done].digest)
                nr_done += 1
            for fd in fds[:nr_done]:
                os.close(fd)
            del self._batch[:nr_done]
        self._batch_size = 0

    def _compare(self, digest: Digest, found: Digest) -> None:
        if found != digest:
            self._reject(digest, "object-digest-mismatch", f"measured {found}")
        else:
            self.report.count_entry("objects", is_corrupted=False)

    def _reject_content(self, digest: Digest) -> None:
        self._reject(digest, "object-verity-failed", "Computing verity digest in userspace")

    def _reject(self, digest: Digest, kind: str, *detail: str) -> None:
        self.report.find(kind, "objects/" + digest.object_path.decode(), *detail)
        self.report.count_entry("objects", is_corrupted=True)
