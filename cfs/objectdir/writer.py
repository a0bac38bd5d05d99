"""Objects that come in pieces."""

from typing import Protocol, Self

from cfs.digest import Algorithm, Digest
from cfs.fsverity import compute_digest
from cfs.objectdir.temporary import Temporary

__all__ = ["Contents", "ObjectWriter"]

Contents = bytes | bytearray | memoryview
_MEMORY_LIMIT = 1 << 20  # bytes


class _Objects(Protocol):
    """What is used of an :class:`~cfs.objectdir.objects.ObjectDirectory`."""

    algorithm: Algorithm

    def put_contents(self, contents: Contents, digest: Digest, *, thorough: bool) -> bool: ...
    def create_temporary(self) -> Temporary: ...
    def adopt(self, temporary: Temporary, size: int, *, thorough: bool) -> tuple[Digest, bool]: ...


class ObjectWriter:
    """An object that comes in pieces; what is not committed leaves nothing.  For one thread.

    What is small is kept in memory until its digest tells whether it has to be written at all.
    """

    def __init__(self, objects: _Objects) -> None:
        """Start an object; ``ObjectDirectory.create`` does."""
        self._objects = objects
        self._buffer = bytearray()
        self._temporary: Temporary | None = None
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._temporary.discard()

    def write(self, data: Contents) -> None:
        """Append bytes.

        Raises:
            OSError: as open(2) and write(2).
        """
        self._size += len(data)
        if self._temporary is None:
            if self._size <= _MEMORY_LIMIT:
                self._buffer += data
                return
            self._temporary = self._objects.create_temporary()
            self._temporary.write(self._buffer)
            self._buffer = bytearray()
        self._temporary.write(data)

    def commit(self, *, thorough: bool = False) -> tuple[Digest, bool]:
        """Finish the object; return its digest, and whether it was new.

        Args:
            thorough: read what is there, if the kernel cannot tell its digest.

        Raises:
            UnsupportedError: fs-verity is required, and kernel or file system lack it.
            OSError: as read(2) and write(2).
        """
        temporary, self._temporary = self._temporary, None
        if temporary:
            return self._objects.adopt(temporary, self._size, thorough=thorough)
        digest = compute_digest(self._buffer, self._objects.algorithm)
        is_new = self._objects.put_contents(self._buffer, digest, thorough=thorough)
        return digest, is_new
