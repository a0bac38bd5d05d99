"""Directory blocks to columns of entries.

Specification: erofs-image section 3; checks of 9.4.  A *chunk* is one block of a directory or
its inline tail; the names of a chunk follow its entries without gaps.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from cfs.erofs import dtypes
from cfs.erofs.arrays import Bytes, Ints, check, contains, not_ascending, ranges, starts_of
from cfs.erofs.format import BLOCK_SIZE, NAME_SIZE_MAX, DataLayout
from cfs.erofs.headers import FIRST_NID, Image, Inodes

__all__ = ["Dirents", "check_names", "load_dirents"]

ENTRY = dtypes.DIRENT.itemsize
_DOT = ord(".")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dirents:
    """Directory entries, ``.`` and ``..`` included, in the order of the image.

    Attributes:
        directory: row of the directory, never falling.
        directory_nid: its nid, for messages.
        nid: where the entry leads; inside the image.
        file_type: type code of the entry.
        name_off, name_size: the name in the image.
        dots: 1 for ``.``, 2 for ``..``, else 0.
    """

    directory: Ints
    directory_nid: Ints
    nid: Ints
    file_type: NDArray[np.uint8]
    name_off: Ints
    name_size: Ints
    dots: NDArray[np.uint8]

    @classmethod
    def concatenate(cls, parts: "list[Dirents]") -> "Dirents":
        """Return the entries of all parts, in order."""
        return cls(
            **{
                column.name: np.concatenate([getattr(part, column.name) for part in parts])
                for column in fields(cls)
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunks:
    owner: Ints  # index of the directory
    nid: Ints
    off: Ints
    size: Ints
    nr_entries: Ints


def load_dirents(image: Image, directories: Inodes, rows: Ints) -> Dirents:
    """Parse all blocks and tails of some directories.

    Args:
        image: the image.
        directories: checked headers, of directories only.
        rows: ``int64[k]``, their rows, ascending.

    Raises:
        FormatError: a check of spec 9.4.1 or 9.4.2 failed.
    """
    chunks = _load_chunks(image, directories)
    chunk = np.repeat(np.arange(len(chunks.owner)), chunks.nr_entries)
    first_word = ranges(chunks.off // 4, 3 * chunks.nr_entries)
    entries = image.words[first_word].view(dtypes.DIRENT)
    owner_nid = chunks.nid[chunk]

    last = np.cumsum(chunks.nr_entries) - 1
    name_start = entries["nameoff"].astype(np.int64)
    name_end = np.roll(name_start, -1)
    name_end[last] = chunks.size
    name_size = name_end - name_start
    check(name_size > 0, owner_nid, "nameoff", "ascending inside the block", name_start)
    name_off = chunks.off[chunk] + name_start
    name_size[last] = _size_until_nul(image.data, name_off[last], name_size[last])
    check(
        (name_size >= 1) & (name_size <= NAME_SIZE_MAX),
        owner_nid,
        "size of a name",
        f"1 to {NAME_SIZE_MAX}",
        name_size,
    )
    nid = entries["nid"]
    check(
        (nid >= FIRST_NID) & (nid < len(image.slots)),
        owner_nid,
        "nid of an entry",
        f"{FIRST_NID} to {len(image.slots) - 1}",
        nid,
    )
    return Dirents(
        directory=rows[chunks.owner][chunk],
        directory_nid=owner_nid,
        nid=nid.astype(np.int64),
        file_type=entries["file_type"],
        name_off=name_off,
        name_size=name_size,
        dots=_dots(image.data, name_off, name_size),
    )


def _load_chunks(image: Image, directories: Inodes) -> _Chunks:
    size = directories.flat_size
    nr_full, rest = size // BLOCK_SIZE, size % BLOCK_SIZE
    nr_chunks = nr_full + (rest > 0)
    owner = np.repeat(np.arange(len(size)), nr_chunks)
    index = ranges(np.zeros_like(size), nr_chunks)
    is_rest = index == nr_full[owner]
    is_tail = is_rest & (directories.layout[owner] == DataLayout.FLAT_INLINE)
    off = BLOCK_SIZE * (directories.i_u[owner].astype(np.int64) + index)
    off = np.where(is_tail, directories.body_off[owner], off)
    chunk_size = np.where(is_rest, rest[owner], BLOCK_SIZE)
    nid = directories.nid[owner]
    check(chunk_size >= ENTRY, nid, "size of a directory tail", f"at least {ENTRY}", chunk_size)
    first = (image.words[off // 4 + 2] & 0xFFFF).astype(np.int64)
    check(
        (first > 0) & (first % ENTRY == 0) & (first <= chunk_size),
        nid,
        "first nameoff",
        "a multiple of 12 inside the block",
        first,
    )
    return _Chunks(owner=owner, nid=nid, off=off, size=chunk_size, nr_entries=first // ENTRY)


def _size_until_nul(data: Bytes, off: Ints, size: Ints) -> Ints:
    """Cut names at their first NUL; only as much is looked at as a valid name can have."""
    window = np.minimum(size, NAME_SIZE_MAX + 1)
    starts = starts_of(window)
    zeros = np.flatnonzero(data[ranges(off, window)] == 0)
    owner = np.searchsorted(starts, zeros, side="right") - 1
    result = size.copy()
    # from the last to the first, so that the first zero of each name stays
    result[owner[::-1]] = (zeros - starts[owner])[::-1]
    return result


def _dots(data: Bytes, off: Ints, size: Ints) -> NDArray[np.uint8]:
    is_dot = data[off] == _DOT
    # a last byte that is a dot too; for names of one byte it is the same
    is_last_dot = data[off + size - 1] == _DOT
    return np.where(is_dot & is_last_dot & (size <= len(b"..")), size, 0).astype(np.uint8)


def check_names(data: Bytes, dirents: Dirents) -> None:
    """Check characters and order of all names (spec 9.4.3, 9.4.4).

    Raises:
        FormatError: a name contains ``/`` or NUL, or does not come after the one before it.
    """
    off, size, nid = dirents.name_off, dirents.name_size, dirents.directory_nid
    for byte, name in ((0, "nul"), (ord("/"), "slash")):
        bad = contains(data, off, size, byte)
        check(~bad, nid, "offset of a name", f"a name without {name}", off)
    pairs = np.flatnonzero(dirents.directory[1:] == dirents.directory[:-1])
    ok = np.ones(len(off), np.bool_)
    ok[not_ascending(data, off, size, pairs) + 1] = False
    check(ok, nid, "offset of a name", "a name greater than the one before", off)
