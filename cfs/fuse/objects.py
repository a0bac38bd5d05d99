"""Open objects for the reference operations: find, check size and digest.

The rules are those of worker/backing.c and worker/verify.c.  Blocking calls only: the caller
runs them in a thread where they may wait.  The set of objects that were verified only grows, and
knowing one late costs a second look; so threads share it without a lock.
"""

import errno
import os
import stat
from collections.abc import Sequence

from cfs.digest import Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import compute_file_digest, measure
from cfs.fuse.choices import Verify
from cfs.fuse.unservable import ServeError
from cfs.inodes import Ino, InodeVector
from cfs.linux.files import openat2

__all__ = ["ObjectFiles"]


class ObjectFiles:
    """The objects of a vector below some directories.

    Args:
        vector: names path, size and digest of each object.
        directories: descriptors, searched in this order; borrowed.
        verify: which digest counts.
    """

    def __init__(self, vector: InodeVector, directories: Sequence[int], verify: Verify) -> None:
        self._vector = vector
        self._directories = directories
        self._verify = verify
        self._verified: set[tuple[Digest, int, int, int, int]] = set()

    def open(self, ino: Ino) -> int:
        """Return a descriptor of the object of a file, owned by the caller.

        Raises:
            ServeError: there is none, or it is not the one that the image means.
        """
        path = self._vector.object_path(ino)
        if path is None:
            raise ServeError("NO_OBJECT", b"", errno.EIO)
        try:
            fd = self._find(path)
        except OSError as error:
            raise ServeError("OPEN", path, error.errno or errno.EIO) from None
        try:
            self._check(ino, path, fd)
        except OSError as error:
            os.close(fd)
            raise ServeError("OPEN", path, error.errno or errno.EIO) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _find(self, path: bytes) -> int:
        for dir_fd in self._directories:
            try:
                return openat2(dir_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _check(self, ino: Ino, path: bytes, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != self._vector.size[ino]:
            raise ServeError("SIZE", path, errno.EIO, status.st_size)
        if self._verify is Verify.OFF:
            return
        digest = self._vector.digest(ino)
        if digest is None:
            raise ServeError("NO_DIGEST", path, errno.EIO)
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if (digest, *identity) not in self._verified:
            self._check_digest(path, fd, status.st_size, digest)
            self._verified.add((digest, *identity))

    def _check_digest(self, path: bytes, fd: int, size: int, expected: Digest) -> None:
        try:
            found = measure(fd)
            if found is None and self._verify is Verify.REQUIRE:
                raise ServeError("NO_VERITY", path, errno.EIO)
            is_other = found is None or found.algorithm is not expected.algorithm
            if is_other and self._verify is Verify.OPEN:
                found = compute_file_digest(fd, size, expected.algorithm)
        except (IntegrityError, UnsupportedError):  # changes meanwhile; an unknown hash
            found = None
        if found != expected:
            raise ServeError("DIGEST", path, errno.EIO)
