"""The flat indexed inode vector: everything that can be served.

Columns, one row per inode; row 0 is never used, row 1 is the root, so that a row number is a
FUSE node id.  All bytes of variable length are offset and size into one address space: first
``pool`` (for an EROFS image, the image itself), then ``extra`` (bytes that the image does not
hold in one piece: xattr names in full, contents that were split).  An offset below
``len(pool)`` points into ``pool``, any other to ``extra[offset - len(pool)]``; no range crosses
the border.

A vector is built and checked once, by whoever makes it; its arrays are read-only and may be
shared between threads without locks.

Whoever makes a vector uses numpy.  Reading one needs no more than columns that can be indexed:
a session attaches with memoryviews and never imports numpy.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NewType, cast

from cfs.digest import Digest
from cfs.errors import NotFoundError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["NO_OBJECT", "ROOT", "Ino", "InodeVector", "view"]

Ino = NewType("Ino", int)
ROOT = Ino(1)
NO_OBJECT = 0xFFFFFFFF
_DIGEST_SIZE = 64  # bytes of a row of object_digest


def view(column: "NDArray[Any]") -> memoryview:
    """Return a column as a memoryview, whose elements are Python integers."""
    return memoryview(cast("Any", column))  # before 3.12 the type of a buffer has no name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InodeVector:
    """All inodes of a file tree; ``n`` rows, ``m`` dirents, ``x`` xattrs, ``o`` objects.

    Attributes:
        mode, nlink, uid, gid, rdev: ``uint32[n]``, as in ``stat``.
        size: ``uint64[n]``, bytes.
        mtime_sec, mtime_nsec: ``int64[n]``, ``uint32[n]``.
        nid: ``uint64[n]``, address in the source; for messages and inode numbers only.
        parent: ``uint32[n]``, row of the directory that holds a directory; root: itself;
            leaves: the directory of the first name found.
        dirent_start: ``uint64[n+1]``, slice of the dirent columns; sorted by name as bytes,
            without ``.`` and ``..``.
        dirent_name_off, dirent_name_size, dirent_ino: ``uint64[m]``, ``uint32[m]``,
            ``uint32[m]``.
        xattr_start: ``uint64[n+1]``, slice of the xattr columns, in the order of the source.
        xattr_name_off, xattr_name_size, xattr_value_off, xattr_value_size: ``uint64[x]``,
            ``uint32[x]``, ``uint64[x]``, ``uint32[x]``; names in full.
        inline_off, inline_size: ``uint64[n]``, ``uint32[n]``: bytes of a regular file that
            has them in the image, or the target of a symlink.
        object: ``uint32[n]``, row in the object columns or ``NO_OBJECT``.
        object_path_off, object_path_size: ``uint64[o]``, ``uint32[o]``: path below the objects
            directory without leading slashes; size 0: only the digest is known.
        object_digest: ``uint8[o, 64]``, zero padded.
        object_digest_size: ``uint8[o]``: 0 (unknown), 32 or 64.
        pool, extra: ``uint8[p]``, ``uint8[q]``.
        nr_blocks: blocks of 4096 bytes of the source, for statfs.
        version: format version of the image (0, 1, 2).
        has_acl: whether some inode has a POSIX ACL.

    A regular file with ``inline_size != size`` and no object path is sparse: it has a size but
    no bytes, and reading it is EIO (spec erofs-image 10.3).
    """

    mode: "NDArray[np.uint32]"
    nlink: "NDArray[np.uint32]"
    uid: "NDArray[np.uint32]"
    gid: "NDArray[np.uint32]"
    rdev: "NDArray[np.uint32]"
    size: "NDArray[np.uint64]"
    mtime_sec: "NDArray[np.int64]"
    mtime_nsec: "NDArray[np.uint32]"
    nid: "NDArray[np.uint64]"
    parent: "NDArray[np.uint32]"
    dirent_start: "NDArray[np.uint64]"
    dirent_name_off: "NDArray[np.uint64]"
    dirent_name_size: "NDArray[np.uint32]"
    dirent_ino: "NDArray[np.uint32]"
    xattr_start: "NDArray[np.uint64]"
    xattr_name_off: "NDArray[np.uint64]"
    xattr_name_size: "NDArray[np.uint32]"
    xattr_value_off: "NDArray[np.uint64]"
    xattr_value_size: "NDArray[np.uint32]"
    inline_off: "NDArray[np.uint64]"
    inline_size: "NDArray[np.uint32]"
    object: "NDArray[np.uint32]"
    object_path_off: "NDArray[np.uint64]"
    object_path_size: "NDArray[np.uint32]"
    object_digest: "NDArray[np.uint8]"
    object_digest_size: "NDArray[np.uint8]"
    pool: "NDArray[np.uint8]"
    extra: "NDArray[np.uint8]"
    nr_blocks: int
    version: int
    has_acl: bool

    def __post_init__(self) -> None:
        for column in fields(self):
            flags = getattr(getattr(self, column.name), "flags", None)
            if flags is not None:
                flags.writeable = False

    def __len__(self) -> int:
        """Number of rows, the unused row 0 included."""
        return len(self.mode)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset`` of the address space of pool and extra."""
        border = len(self.pool)
        if offset < border:
            return bytes(view(self.pool)[offset : offset + size])
        return bytes(view(self.extra)[offset - border : offset - border + size])

    def dirent_name(self, dirent: int) -> bytes:
        """Return the name of a row of the dirent columns."""
        return self.read(int(self.dirent_name_off[dirent]), int(self.dirent_name_size[dirent]))

    def entries(self, ino: Ino) -> Iterator[tuple[bytes, Ino]]:
        """Yield name and row of the entries of a directory, sorted by name."""
        for dirent in range(int(self.dirent_start[ino]), int(self.dirent_start[ino + 1])):
            yield self.dirent_name(dirent), Ino(int(self.dirent_ino[dirent]))

    def lookup(self, parent: Ino, name: bytes) -> Ino:
        """Return the row of the entry ``name`` of a directory.

        Raises:
            NotFoundError: there is none.
        """
        low, high = int(self.dirent_start[parent]), int(self.dirent_start[parent + 1])
        end = high
        while low < high:
            middle = (low + high) // 2
            if self.dirent_name(middle) < name:
                low = middle + 1
            else:
                high = middle
        if low < end and self.dirent_name(low) == name:
            return Ino(int(self.dirent_ino[low]))
        msg = f"no entry {name!r}"
        raise NotFoundError(msg)

    def resolve(self, path: str | bytes) -> Ino:
        """Return the row of a path below the root; symlinks are not followed.

        Raises:
            NotFoundError: a component is missing or no directory.
        """
        raw = path.encode(errors="surrogateescape") if isinstance(path, str) else path
        ino = ROOT
        for name in raw.split(b"/"):
            if name in (b"", b"."):
                continue
            if not self.is_directory(ino):
                msg = f"{raw!r}: not a directory before {name!r}"
                raise NotFoundError(msg)
            ino = Ino(int(self.parent[ino])) if name == b".." else self.lookup(ino, name)
        return ino

    def walk(self) -> Iterator[tuple[bytes, Ino]]:
        """Yield path and row of every name, depth-first in name order; the root is ``/``."""
        stack: list[tuple[bytes, Ino]] = [(b"/", ROOT)]
        while stack:
            path, ino = stack.pop()
            yield path, ino
            if self.is_directory(ino):
                prefix = path if path == b"/" else path + b"/"
                below = [(prefix + name, child) for name, child in self.entries(ino)]
                stack.extend(reversed(below))

    def is_directory(self, ino: Ino) -> bool:
        """Whether the row is a directory."""
        return stat.S_ISDIR(int(self.mode[ino]))

    def content(self, ino: Ino) -> bytes:
        """Return the bytes of an inline file, or the target of a symlink; else nothing."""
        return self.read(int(self.inline_off[ino]), int(self.inline_size[ino]))

    def xattrs(self, ino: Ino) -> dict[bytes, bytes]:
        """Return the xattrs of a row, names in full, in the order of the source."""
        return {
            self.read(int(self.xattr_name_off[row]), int(self.xattr_name_size[row])): self.read(
                int(self.xattr_value_off[row]), int(self.xattr_value_size[row])
            )
            for row in range(int(self.xattr_start[ino]), int(self.xattr_start[ino + 1]))
        }

    def object_path(self, ino: Ino) -> bytes | None:
        """Return the path of the object below the objects directory, or None."""
        row = int(self.object[ino])
        if row == NO_OBJECT or not self.object_path_size[row]:
            return None
        return self.read(int(self.object_path_off[row]), int(self.object_path_size[row]))

    def digest(self, ino: Ino) -> Digest | None:
        """Return the fs-verity digest that the image records for a file, or None."""
        row = int(self.object[ino])
        if row == NO_OBJECT or not self.object_digest_size[row]:
            return None
        start = row * _DIGEST_SIZE
        digests = view(self.object_digest).cast("B")
        return Digest(bytes(digests[start : start + int(self.object_digest_size[row])]))
