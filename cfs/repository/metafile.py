"""The file ``meta.json``: read, measure and create it (spec repository 1.3, 1.4).

A store is secure exactly if this file has fs-verity.
"""

import os
import stat

from cfs.digest import Algorithm
from cfs.errors import FormatError, IntegrityError
from cfs.fsverity import measure
from cfs.linux.files import naming, open_path
from cfs.objectdir.temporary import Temporary
from cfs.objectdir.verity import Verity, seal
from cfs.repository.metadata import Metadata
from cfs.repository.refs import read_link

__all__ = ["NAME", "create_metadata", "read_metadata"]

NAME = b"meta.json"
_MAX_SIZE = 1 << 20


def read_metadata(directory_fd: int) -> tuple[Metadata, bool] | None:
    """Return what ``meta.json`` says and whether the store is secure; None if it is missing.

    Raises:
        FormatError: it cannot be parsed, or is a link that leads nowhere.
        IntegrityError: it has fs-verity of another hash than the store's.
        OSError: reading failed.
    """
    with naming(NAME):
        try:
            fd = open_path(NAME, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory_fd)
        except FileNotFoundError:
            if read_link(directory_fd, NAME) is None:
                return None
            msg = "meta.json: is a link that leads nowhere"
            raise FormatError(msg) from None
        try:
            metadata = Metadata.parse(_read(fd))
            return metadata, _is_secure(fd, metadata.algorithm)
        finally:
            os.close(fd)


def _read(fd: int) -> bytes:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_SIZE:
        msg = f"meta.json: expected a regular file of at most {_MAX_SIZE} bytes"
        raise FormatError(msg)
    return os.pread(fd, _MAX_SIZE, 0)


def _is_secure(fd: int, algorithm: Algorithm) -> bool:
    digest = measure(fd)
    if digest is not None and digest.algorithm is not algorithm:
        msg = (
            f"meta.json: fs-verity uses {digest.algorithm.name.lower()}, "
            f"expected {algorithm.name.lower()}"
        )
        raise IntegrityError(msg)
    return digest is not None


def create_metadata(
    directory_fd: int, metadata: Metadata, *, is_secure: bool, replace: bool = False
) -> None:
    """Write ``meta.json``, durably and whole or not at all.

    Args:
        directory_fd: the store.
        metadata: what to write.
        is_secure: enable fs-verity.
        replace: take the place of one that is there.

    Raises:
        FileExistsError: there is one, and it is not to be replaced; nothing was changed.
        UnsupportedError: kernel or file system have no fs-verity.
        OSError: writing failed.
    """
    verity = Verity.REQUIRE if is_secure else Verity.NEVER
    with naming(NAME):
        file = Temporary.create(directory_fd)
        try:
            file.write(metadata.encode())
            os.fsync(file.fd)
            seal(file, verity, metadata.algorithm)
            if replace:
                file.replace(directory_fd, NAME)
            else:
                file.place(directory_fd, NAME)
        finally:
            file.discard()
        os.fsync(directory_fd)
