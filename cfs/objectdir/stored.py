"""Objects that have their names: opening and judging them (spec repository 1.4).

A directory of objects may hold anything, since others write to it too: what is opened has to be
a regular file, reached without a symlink.
"""

import errno
import os
import stat

from cfs.digest import Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import compute_file_digest, measure
from cfs.linux.files import openat2
from cfs.objectdir.verity import Verity

__all__ = ["check_object", "is_good", "open_stored"]

_OPEN_OBJECT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def is_good(
    directory: int, path: bytes, digest: Digest, size: int, verity: Verity, *, thorough: bool
) -> bool:
    """Whether an object is there and may be taken for good.

    Args:
        directory: what ``path`` is relative to.
        path: of the object.
        digest: of the object.
        size: that it should have, in bytes.
        verity: what is demanded of fs-verity.
        thorough: read it if the kernel cannot tell its digest; else its size has to do.

    Raises:
        OSError: it cannot be opened or read.
    """
    try:
        fd = open_stored(directory, path, digest)
    except (FileNotFoundError, IntegrityError):
        return False
    try:
        if os.fstat(fd).st_size != size:
            return False
        measured = check_object(fd, digest, verity)
        if thorough and not measured:
            return compute_file_digest(fd, size, digest.algorithm) == digest
    except IntegrityError:
        return False
    finally:
        os.close(fd)
    return True


def open_stored(directory: int, path: bytes, digest: Digest) -> int:
    """Return a read-only descriptor of an object.

    Raises:
        IntegrityError: it is no regular file.
        OSError: as openat2(2).
    """
    try:
        fd = openat2(directory, path, _OPEN_OBJECT)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENXIO):
            msg = f"object {digest}: expected a regular file"
            raise IntegrityError(msg) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        msg = f"object {digest}: expected a regular file"
        raise IntegrityError(msg)
    return fd


def check_object(fd: int, digest: Digest, verity: Verity) -> Digest | None:
    """Compare what the kernel measures for an object with its name.

    Returns:
        The measured digest; None if the object has no fs-verity, and needs none.

    Raises:
        IntegrityError: it is another digest, or none although it is required.
    """
    try:
        found = measure(fd)
    except UnsupportedError as error:
        msg = f"object {digest}: {error}"
        raise IntegrityError(msg) from error
    if found is None:
        if verity is Verity.REQUIRE:
            msg = f"object {digest}: fs-verity is not enabled"
            raise IntegrityError(msg)
    elif found != digest:
        msg = f"object {digest}: its fs-verity digest is {found}"
        raise IntegrityError(msg)
    return found
