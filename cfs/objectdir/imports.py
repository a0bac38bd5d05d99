"""Making an object of a file on disk without copying it, where possible (spec repository 2.5)."""

import errno
import os
from enum import Enum

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import compute_file_digest
from cfs.linux.capabilities import Capability, has_capability
from cfs.linux.files import clone_file, copy_contents
from cfs.objectdir.temporary import Temporary, discarding
from cfs.objectdir.verity import Verity, seal

__all__ = ["Importer", "Method", "digest_of"]


class Method(Enum):
    """How a file became an object."""

    REFLINKED = "reflinked"
    HARDLINKED = "hardlinked"
    COPIED = "copied"
    PRESENT = "already present"


class Importer:
    """Takes files over.

    Remembers between which devices there are no reflinks; the set only grows, any thread may call.
    """

    def __init__(self, algorithm: Algorithm, verity: Verity) -> None:
        self._algorithm = algorithm
        self._verity = verity
        self._unclonable: set[tuple[int, int]] = set()

    def take(
        self, directory: int, fd: int, size: int, *, link: bool, copy: bool
    ) -> tuple[Temporary, Digest, Method]:
        """Return a file with the contents of another, or that file itself under a second name.

        Args:
            directory: the directory of objects.
            fd: regular file open for reading; borrowed, its position moves.
            size: its size in bytes.
            link: whether it may be hard linked.
            copy: whether it may be copied.

        Raises:
            IntegrityError: the file has another size.
            UnsupportedError: fs-verity is required, and kernel or file system lack it.
            OSError: reading or writing failed; the reason why it cannot be linked if it must
                not be copied.
        """
        with discarding(Temporary.create(directory)) as temporary:
            if self._clone(fd, temporary):
                return temporary, self._digest(temporary, size), Method.REFLINKED
            if link:
                try:
                    linked, digest = self._link(directory, fd, size)
                except (OSError, UnsupportedError):
                    if not copy:
                        raise
                else:
                    temporary.discard()
                    return linked, digest, Method.HARDLINKED
            copy_contents(fd, temporary.fd, size)
            return temporary, self._digest(temporary, size), Method.COPIED

    def _clone(self, fd: int, temporary: Temporary) -> bool:
        devices = os.fstat(fd).st_dev, os.fstat(temporary.fd).st_dev
        if devices in self._unclonable:
            return False
        if not clone_file(fd, temporary.fd):
            self._unclonable.add(devices)
            return False
        return True

    def _link(self, directory: int, fd: int, size: int) -> tuple[Temporary, Digest]:
        if not has_capability(Capability.DAC_READ_SEARCH):
            # the kernel's own rule for linkat(2) with AT_EMPTY_PATH
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        with discarding(Temporary.link(directory, fd)) as temporary:
            return temporary, self._digest(temporary, size)

    def _digest(self, temporary: Temporary, size: int) -> Digest:
        return digest_of(temporary, size, self._algorithm, self._verity)


def digest_of(temporary: Temporary, size: int, algorithm: Algorithm, verity: Verity) -> Digest:
    """Return the digest of a file that is complete; it gets fs-verity if it should have it.

    Raises:
        IntegrityError: it has not ``size`` bytes.
        UnsupportedError: fs-verity is required, and kernel or file system lack it.
        OSError: as read(2) and the kernel's fs-verity.
    """
    found = temporary.size()
    if found != size:
        msg = f"file changed while it was read: expected {size} bytes, found {found}"
        raise IntegrityError(msg)
    measured = seal(temporary, verity, algorithm)
    return measured or compute_file_digest(temporary.fd, size, algorithm)
